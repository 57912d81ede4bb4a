"""The parts of the engine by themselves, each against its own limit, on SmolLM2-135M.

    python -m segue.jobs.bench.engine mask       the segment mask against the causal one, and against theory
    python -m segue.jobs.bench.engine sharing     prefix caching on against off, for several shares of shared tokens
    python -m segue.jobs.bench.engine limits      prefill and decoding against the matrix products of their own shapes
    python -m segue.jobs.bench.engine precision   bf16 against fp32, token by token

Both sides are timed in turn, from an empty cache, and their medians are compared.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from segue.attention.segments import Segment
from segue.jobs.bench.machine import (
    SOURCE,
    body_seconds,
    head_seconds,
    linear_layers,
    machine,
    say,
    seconds_of,
    weight_seconds,
)
from segue.jobs.bench.prompts import shared_prompts
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest

LONG_PROMPTS = (1_000, 4_000, 8_000)  # tokens
OWN_TOKENS = 64
SHARED_TIMES = (1, 4, 16)  # shared tokens for each own token
NUM_POSITIONS = 10_000
NUM_STEPS = 64
Mask = Literal["segment", "causal"]
Prompts = Sequence[Sequence[Segment]]


def main() -> None:
    args = _arguments()
    cases: dict[str, Callable[[TreeModel, int], dict[str, Any]]] = {
        "mask": _mask,
        "sharing": _sharing,
        "limits": _limits,
        "precision": _precision,
    }
    found = cases[args.case](load_model(SOURCE, dtype="bfloat16"), args.repeats)
    print(json.dumps({"benchmark": f"engine {args.case}", **machine(), "repeats": args.repeats, **found}))


def _mask(model: TreeModel, repeats: int) -> dict[str, Any]:
    """Prompts of one segment: bidirectional attention sees all pairs of tokens, causal attention half of them."""
    prompts = shared_prompts(model.tokenizer, 32, system_words=0, own_words=(75, 750))
    told = _against(
        {mask: lambda mask=mask: _generate(model, prompts, 16, mask=mask) for mask in ("causal", "segment")}, repeats
    )
    ratio = told["causal"] / told["segment"]
    longest = max(len(prompt[0].token_ids) for prompt in prompts)
    say(f"prompts of up to {longest:,} tokens, 16 new ones: segment at {ratio:.2f} of causal")
    curve = []
    for length in LONG_PROMPTS:
        text = [(Segment(tuple(_text(model, length)), True),)]
        seconds = _against(
            {mask: lambda mask=mask, text=text: _generate(model, text, 1, mask=mask) for mask in ("causal", "segment")},
            repeats,
        )
        curve.append({"tokens": length, **seconds, "ratio": seconds["causal"] / seconds["segment"]})
        curve[-1]["theory"] = _work(model, length, length / 2) / _work(model, length, length)
        say(f"one prompt of {length:,} tokens: {curve[-1]['ratio']:.2f}, by arithmetic {curve[-1]['theory']:.2f}")
    return {"ratio_up_to_1k": ratio, "seconds_up_to_1k": told, "long": curve}


def _work(model: TreeModel, num_tokens: int, seen: float) -> float:
    """FLOPs of a prompt in which each token sees `seen` others."""
    products = 2 * num_tokens * sum(layer.weight.numel() for layer in linear_layers(model))
    config = model.model.config
    return products + 4 * config.num_hidden_layers * config.hidden_size * num_tokens * seen


def _sharing(model: TreeModel, repeats: int) -> dict[str, Any]:
    """Rows generate one token, so only prefill is timed. The bound is requested tokens over distinct tokens."""
    curve = []
    for times in SHARED_TIMES:
        shared = Segment(tuple(_text(model, times * OWN_TOKENS)), True)
        prompts = [(shared, Segment(tuple(_text(model, OWN_TOKENS, skip=7 * n)), True)) for n in range(64)]
        seconds = _against(
            {
                name: lambda name=name, prompts=prompts: _generate(model, prompts, 1, sharing=name == "on")
                for name in ("off", "on")
            },
            repeats,
        )
        asked = sum(len(segment.token_ids) for prompt in prompts for segment in prompt)
        bound = asked / (len(shared.token_ids) + sum(len(prompt[1].token_ids) for prompt in prompts))
        speedup = seconds["off"] / seconds["on"]
        curve.append({"shared_to_own": times, **seconds, "speedup": speedup, "bound": bound})
        say(f"{times}:1 shared: {speedup:.2f} times as fast, bound {bound:.2f}: {speedup / bound:.0%}")
    return {"sharing": curve}


def _limits(model: TreeModel, repeats: int) -> dict[str, Any]:
    """Against the products alone, measured at the same time, since a machine's rate changes by the minute."""
    config = EngineConfig()
    text = [(Segment(tuple(_text(model, 512, skip=11 * n)), True),) for n in range(16)]
    short = shared_prompts(model.tokenizer, config.max_num_seqs, system_words=0, own_words=(8, 16))
    step_tokens, num_rows = config.max_num_batched_tokens, config.max_num_seqs
    prefill, prefill_limit, torch_limit, step, step_limit = [], [], [], [], []
    for _ in range(repeats):
        prefill_limit.append(body_seconds(model, step_tokens) * 512 * 16 / step_tokens)
        torch_limit.append(body_seconds(model, step_tokens, ours=False) * 512 * 16 / step_tokens)
        prefill.append(seconds_of(lambda: _generate(model, text, 1)))
        step_limit.append(max(body_seconds(model, num_rows) + head_seconds(model, num_rows), weight_seconds(model)))
        step.append(_step_seconds(model, short))
    found = {
        "prefill_tokens_per_s": 512 * 16 / statistics.median(prefill),
        "prefill_share": statistics.median(prefill_limit) / statistics.median(prefill),
        "prefill_share_of_torch": statistics.median(torch_limit) / statistics.median(prefill),
        "decode_step_ms": 1e3 * statistics.median(step),
        "decode_limit_ms": 1e3 * statistics.median(step_limit),
    }
    found["decode_times_limit"] = found["decode_step_ms"] / found["decode_limit_ms"]
    say(
        f"prefill: {found['prefill_tokens_per_s']:,.0f} tokens/s, {found['prefill_share']:.0%} of what its products "
        f"allow, {found['prefill_share_of_torch']:.0%} of what torch's do; a decode step of {num_rows} rows: "
        f"{found['decode_step_ms']:.1f} ms, {found['decode_times_limit']:.2f} times what its products and its weights' "
        f"way from memory allow"
    )
    return found


def _step_seconds(model: TreeModel, prompts: Prompts) -> float:
    """The median time of a step in which all rows generate."""
    engine = Engine(model, EngineConfig(mask="causal"))
    params = SamplingParams(max_tokens=NUM_STEPS, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add(index, GenerationRequest(tuple(prompt), params, b""))
    engine.step()  # computes all prompts
    taken: list[float] = []
    while engine.has_work:
        taken.append(seconds_of(engine.step))
    return statistics.median(taken)


def _precision(model: TreeModel, repeats: int) -> dict[str, Any]:
    """What fp32 generates, scored token by token in both precisions, and how often bf16 prefers another token."""
    exact = load_model(SOURCE, dtype="float32")
    prompts = shared_prompts(exact.tokenizer, 64, system_words=0, own_words=(30, 110))
    params = SamplingParams(max_tokens=-(-NUM_POSITIONS // len(prompts)), ignore_eos=True)
    outputs = Engine(exact, EngineConfig(mask="causal")).generate(prompts, params)
    pairs: list[tuple[Sequence[Segment], Sequence[int]]] = []
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0].token_ids
        chain = [token for segment in prompt for token in segment.token_ids]
        pairs += [((Segment((*chain, *answer[:n]), False),), answer[n : n + 1]) for n in range(len(answer))]
    pairs = pairs[:NUM_POSITIONS]
    wanted, got = (Engine(each, EngineConfig(mask="causal")).loglikelihood(pairs) for each in (exact, model))
    differences = [abs(a.logprob - b.logprob) for a, b in zip(wanted, got, strict=True)]
    found = {
        "positions": len(pairs),
        "max_logprob_difference": max(differences),
        "mean_logprob_difference": statistics.mean(differences),
        "flipped": sum(a.is_greedy and not b.is_greedy for a, b in zip(wanted, got, strict=True)),
    }
    say(
        f"{len(pairs):,} tokens: log-probabilities differ by {found['mean_logprob_difference']:.4f}, at most by "
        f"{found['max_logprob_difference']:.3f}; bf16 would have chosen another token {found['flipped']} times"
    )
    return found


def _against(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each, run in turn after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for count in range(repeats + 1):
        for name, run in work.items():
            taken = seconds_of(run)
            if count:
                seconds[name].append(taken)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _generate(
    model: TreeModel, prompts: Prompts, max_tokens: int, *, mask: Mask = "causal", sharing: bool = True
) -> None:
    engine = Engine(model, EngineConfig(mask=mask, enable_prefix_caching=sharing))
    engine.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def _text(model: TreeModel, num_tokens: int, skip: int = 0) -> list[int]:
    """Token ids of plain words. Another `skip` gives other words."""
    (prompt,) = shared_prompts(model.tokenizer, 1, system_words=0, own_words=(num_tokens, num_tokens), seed=skip)
    return list(prompt[0].token_ids[:num_tokens])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the engine's parts against their limits")
    parser.add_argument("case", choices=["mask", "sharing", "limits", "precision"])
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
