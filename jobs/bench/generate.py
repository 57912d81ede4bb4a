"""Greedy generation from shared prompts: Segue, transformers' `generate` and vLLM with prefix caching, in one run.

    python -m segue.jobs.bench.generate [--case shared | prefixes | decode] [--vllm-python VENV/bin/python]

shared: one system prompt of 300 words, 30 to 110 own words a row, 16 new tokens. prefixes: rows take several system
prompts in turn, with KV memory for all or (--kv-tokens) for some of them. decode: 64 short prompts, 128 new tokens. All
under the causal mask, since the peers have no other.

First the answers are checked: in fp32 the tokens of some rows must equal those of transformers, or tie with them. Then
all are timed in turn, each from an empty cache, and their medians are compared. The limit is the time of the model's
own matrix products at this machine's rate for their shapes: prompt tokens in steps of 1,024, generated ones in full
batches.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from segue.attention.segments import Segment
from segue.jobs.bench.machine import PREFILL_TOKENS, SOURCE, body_seconds, head_seconds, machine, say, seconds_of
from segue.jobs.bench.peers import Transformers, Vllm
from segue.jobs.bench.prompts import shared_prompts, token_ids
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.params import SamplingParams

TIE = 1e-3  # between two logits in fp32; closer ones may be chosen differently
VLLM_BLOCK = 32  # tokens; vLLM's attention on CPUs needs a multiple of this
PEER_BATCHES = (1, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Case:
    """The workload, the same for all."""

    num_rows: int
    num_systems: int
    system_words: int
    own_words: tuple[int, int]
    max_tokens: int

    def prompts(self, tokenizer: Any) -> list[tuple[Segment, ...]]:
        return shared_prompts(
            tokenizer,
            self.num_rows,
            num_systems=self.num_systems,
            system_words=self.system_words,
            own_words=self.own_words,
        )


CASES = {
    "shared": Case(64, 1, 300, (30, 110), 16),
    "prefixes": Case(1024, 16, 300, (30, 110), 16),
    "decode": Case(64, 1, 0, (8, 16), 128),
}


def main() -> None:
    args = _arguments()
    directory = str(safetensors_directory(locate(SOURCE)))
    model = load_model(directory, dtype=args.dtype)
    case = CASES[args.case]
    asked = {"num_rows": args.rows, "num_systems": args.systems, "max_tokens": args.new_tokens}
    case = replace(case, **{name: number for name, number in asked.items() if number})
    prompts = case.prompts(model.tokenizer)
    report: dict[str, Any] = {
        "benchmark": f"generate {args.case}",
        **machine(),
        "dtype": args.dtype,
        "rows": case.num_rows,
        "systems": case.num_systems,
        "max_tokens": case.max_tokens,
        "kv_tokens": args.kv_tokens,
        "max_num_seqs": args.max_num_seqs,
    }
    report |= _check(directory, prompts[: args.check], case.max_tokens)
    report |= _timed(args, model, directory, prompts, case.max_tokens)
    print(json.dumps(report))


def _check(directory: str, prompts: Sequence[Sequence[Segment]], max_tokens: int) -> dict[str, Any]:
    """Compare tokens with those of transformers in fp32. Ends the program at a difference that is not a tie."""
    if not prompts:
        return {}
    engine = Engine(load_model(directory, dtype="float32"), EngineConfig(mask="causal"))
    found = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    ours = [output.outputs[0].token_ids for output in found]
    wanted = Transformers(directory, "float32").generate([token_ids(each) for each in prompts], max_tokens, 1)
    ties = 0
    for prompt, got, want in zip(prompts, ours, wanted, strict=True):
        if got == want:
            continue
        place = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        logits = engine.logits([[*prompt, Segment(tuple(got[:place]), False)] if place else prompt])[0]
        gap = abs(float(logits[got[place]] - logits[want[place]]))
        if gap > TIE:
            raise SystemExit(f"wrong answers: token {place} is {got[place]} and not {want[place]}, logits {gap} apart")
        ties += 1
    say(f"checked {len(prompts)} rows in fp32: transformers' tokens, {ties} of them up to a tie")
    return {"checked_rows": len(prompts), "ties": ties}


def _timed(
    args: argparse.Namespace,
    model: TreeModel,
    directory: str,
    prompts: Sequence[Sequence[Segment]],
    max_tokens: int,
) -> dict[str, Any]:
    """The medians of runs in turn."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    plain = [token_ids(prompt) for prompt in prompts]
    some = plain[: args.peer_rows]
    _fresh(args, model).generate(prompts[:8], params)
    seconds: dict[str, list[float]] = {"segue": []}
    engine = _fresh(args, model)
    with contextlib.ExitStack() as stack:
        transformers = Transformers(directory, args.dtype) if args.peer_rows else None
        batch_size = transformers.best_batch_size(some, max_tokens, PEER_BATCHES) if transformers else 0
        vllm = stack.enter_context(_vllm(args, directory)) if args.vllm_python else None
        if vllm:
            vllm.generate(plain[:8], max_tokens)
        for _ in range(args.repeats):
            engine = _fresh(args, model)
            seconds["segue"].append(seconds_of(lambda engine=engine: engine.generate(prompts, params)))
            if vllm:
                seconds.setdefault("vllm", []).append(vllm.generate(plain, max_tokens)[0])
            if transformers:
                taken = seconds_of(lambda: transformers.generate(some, max_tokens, batch_size))
                seconds.setdefault("transformers", []).append(taken * len(plain) / len(some))
            say(", ".join(f"{who} {len(plain) / each[-1]:.2f} rows/s" for who, each in seconds.items()))
    rates = {who: len(plain) / statistics.median(each) for who, each in seconds.items()}
    limit = _least_seconds(model, engine, args.max_num_seqs)
    found: dict[str, Any] = {
        "repeats": args.repeats,
        "seconds": seconds,
        "rows_per_s": rates,
        "tokens_per_s": {who: rate * max_tokens for who, rate in rates.items()},
        "times": {who: rates["segue"] / rate for who, rate in rates.items() if who != "segue"},
        "transformers_batch_size": batch_size,
        "vllm_version": vllm.version if vllm else None,
        "tokens_computed": engine.stats.num_computed_tokens,
        "tokens_requested": engine.stats.num_prompt_tokens,
        "empty_slots": engine.stats.num_empty_slots / max(1, engine.stats.num_decode_slots),
        "limit_rows_per_s": len(plain) / limit,
        "share_of_limit": rates["segue"] * limit / len(plain),
    }
    say(
        f"medians of {args.repeats}: "
        + ", ".join(f"{who} {rate:.2f} rows/s" for who, rate in rates.items())
        + "".join(f"; {ratio:.2f} times {who}" for who, ratio in found["times"].items())
        + f"; {found['share_of_limit']:.0%} of the {found['limit_rows_per_s']:.1f} that the matrix products allow"
    )
    return found


def _vllm(args: argparse.Namespace, directory: str) -> Vllm:
    options: dict[str, int] = {}
    if args.kv_tokens:
        options = {"num_gpu_blocks_override": args.kv_tokens // VLLM_BLOCK, "block_size": VLLM_BLOCK}
    return Vllm(args.vllm_python, directory, args.dtype, max_num_seqs=args.max_num_seqs, **options)


def _fresh(args: argparse.Namespace, model: TreeModel) -> Engine:
    """An engine with an empty cache."""
    kv_bytes = args.kv_tokens * model.kv_shape.bytes_per_token if args.kv_tokens else None
    return Engine(model, EngineConfig(mask="causal", max_num_seqs=args.max_num_seqs, kv_cache_memory_bytes=kv_bytes))


def _least_seconds(model: TreeModel, engine: Engine, batch: int) -> float:
    """The time of the matrix products of everything that the engine computed."""
    stats = engine.stats
    decoded = stats.num_generated_tokens - stats.num_rows  # the first token of a row comes from its prompt's step
    prefill = stats.num_computed_tokens * body_seconds(model, PREFILL_TOKENS) / PREFILL_TOKENS
    return (
        prefill
        + (decoded * body_seconds(model, batch) + stats.num_generated_tokens * head_seconds(model, batch)) / batch
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="generation against transformers and vLLM")
    parser.add_argument("--case", choices=list(CASES), default="shared")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--systems", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--kv-tokens", type=int, help="KV memory of Segue and vLLM; if not given, enough for all")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="rows that generate at once, Segue and vLLM")
    parser.add_argument("--check", type=int, default=4, help="rows compared with transformers in fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-rows", type=int, default=64, help="rows that transformers is timed on; 0: not at all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM")
    return parser.parse_args()


if __name__ == "__main__":
    main()
