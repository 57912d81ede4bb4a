"""Throughput of a GPU: shared prompts over a model of Llama-3.2-1B's shape with random weights; Segue, transformers.

    python -m segue.jobs.bench.gpu [--rows 512] [--out FOLDER]

First the causal logits of a few rows are compared with those of transformers. Then the limits of the card are measured
(a copy through its memory, a large matrix product); prefill and decode of both masks, as shares of these limits;
transformers' `generate` at its best batch size over the same prompts; and which kernels take a step's time. Needs no
Ray, no network and no weights.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from segue.attention.segments import Segment
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.echo import echo_tokenizer
from segue.workers.models.tree_model import TreeModel, tree_model
from segue.workers.rows.params import SamplingParams

CUDA = torch.device("cuda", 0)
RESULTS = Path(__file__).with_name("RESULTS.md")
SHAPE = {  # of Llama-3.2-1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NUM_SYSTEM, NUM_OWN, NUM_NEW = 1000, (30, 110), 32
KV_BYTES = 16 << 30
MARGIN = 1.25  # rounding may differ by this much


def main() -> None:
    args = _arguments()
    found: dict[str, Any] = {"card": torch.cuda.get_device_name(CUDA), "torch": torch.__version__, **_ceilings()}
    own = _model()
    prompts = _prompts(args.rows)
    found["logits_error"] = _check(own, prompts[:4])
    loaded = tree_model(own, echo_tokenizer())
    found["parameters"] = sum(p.numel() for p in own.parameters())
    for name, mask, graphs in (
        ("causal", "causal", False),
        ("segment", "segment", False),
        ("segment_graphs", "segment", True),
    ):
        found[name] = _segue(loaded, prompts, found, mask=mask, decode_graphs=graphs)
        print(name, found[name])
    found["profile"] = _profile(loaded, prompts)
    own.set_attn_implementation("sdpa")
    found["transformers"] = max((_transformers(own, prompts, size) for size in args.peer_batches), key=_rows_of)
    found["times_transformers"] = found["causal"]["rows_per_second"] / found["transformers"]["rows_per_second"]
    if args.out:
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    for line in found.pop("profile"):
        print(line)
    if args.record:
        _record(found)
    print(json.dumps({"bench": "gpu", "rows": args.rows, **found}))


def _record(found: dict[str, Any]) -> None:
    """Append a line to RESULTS.md, whose last section has the cards."""
    causal, segment, graphs = found["causal"], found["segment"], found["segment_graphs"]
    line = (
        f"\n{found['card']}, torch {found['torch']}, {time.strftime('%Y-%m-%d')}: causal "
        f"{causal['rows_per_second']:.1f} rows/s ({found['times_transformers']:.1f} times transformers), segment mask "
        f"{segment['rows_per_second']:.1f}, with decode graphs {graphs['rows_per_second']:.1f}; prefill "
        f"{segment['prefill_tokens_per_second']:,.0f} tokens/s, {segment['prefill_share_of_limit']:.0%} of the card's "
        f"matrix rate; a decode step {segment['decode_step_ms']:.1f} ms, with graphs {graphs['decode_step_ms']:.1f}, "
        f"{graphs['decode_share_of_limit']:.0%} of its bandwidth.\n"
    )
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(line)


def _ceilings() -> dict[str, float]:
    """GB/s of a copy, reads and writes together; TFLOP/s of a product in bf16."""
    a = torch.randn(1 << 30, dtype=torch.bfloat16, device=CUDA)
    b = torch.empty_like(a)
    copy = _seconds(lambda: b.copy_(a))
    x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    product = _seconds(lambda: x @ y)
    return {"copy_gb_per_s": 2 * a.nbytes / copy / 1e9, "matmul_tflop_per_s": 2 * 8192**3 / product / 1e12}


def _model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(CUDA):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=torch.bfloat16)
    return model.eval()


def _prompts(num_rows: int) -> list[list[Segment]]:
    rng = random.Random(0)
    system = Segment(tuple(rng.randrange(3, 120_000) for _ in range(NUM_SYSTEM)), True)
    return [
        [system, Segment(tuple(rng.randrange(3, 120_000) for _ in range(rng.randrange(*NUM_OWN))), True)]
        for _ in range(num_rows)
    ]


def _check(own: Any, prompts: Sequence[Sequence[Segment]]) -> dict[str, float]:
    """The error of causal logits in bf16 against fp32, as a share of their norm: ours and that of transformers.

    Raises AssertionError if ours is more than MARGIN times as large.
    """
    own.set_attn_implementation("eager")
    ids = [torch.tensor([[t for s in prompt for t in s.token_ids]], device=CUDA) for prompt in prompts]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([model(each, use_cache=False).logits[0, -1].float() for each in ids])

    precise = copy.deepcopy(own).float()
    wanted = logits(precise)
    del precise
    theirs = logits(own)
    ours = Engine(tree_model(own, echo_tokenizer()), EngineConfig(mask="causal")).logits(prompts)
    errors = {
        name: float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
        for name, got in (("segue", ours), ("transformers", theirs))
    }
    assert errors["segue"] < MARGIN * errors["transformers"], errors
    return errors


def _segue(model: TreeModel, prompts: Sequence[Any], ceilings: dict[str, Any], **options: Any) -> dict[str, Any]:
    def run(num_new: int) -> float:
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_tokens=num_new, ignore_eos=True))
        torch.cuda.synchronize()
        return time.perf_counter() - start

    engine = Engine(model, _config(len(prompts), **options))
    run(NUM_NEW + 1)  # warm; captures graphs

    def fresh(num_new: int) -> float:
        """A run from an empty cache."""
        engine.core.nodes.make_room(engine.core.runner.memory.budget_tokens)
        return run(num_new)

    computed, requested = engine.stats.num_computed_tokens, engine.stats.num_prompt_tokens
    prefill = statistics.median(fresh(1) for _ in range(3))
    whole = statistics.median(fresh(NUM_NEW + 1) for _ in range(3))
    step = (whole - prefill) / NUM_NEW
    weights = sum(p.numel() for p in model.model.parameters())
    kv = model.kv_shape.bytes_per_token * (NUM_SYSTEM + len(prompts) * (sum(NUM_OWN) // 2 + NUM_NEW // 2))
    return {
        "rows_per_second": len(prompts) / whole,
        "prefill_tokens_per_second": computed / prefill,
        "prefill_share_of_limit": 2 * weights * computed / prefill / 1e12 / ceilings["matmul_tflop_per_s"],
        "decode_step_ms": 1e3 * step,
        # A copy reads and writes. A step only reads.
        "decode_share_of_limit": (2 * weights + kv) / step / 1e9 / (ceilings["copy_gb_per_s"]),
        "computed_tokens": computed,
        "requested_tokens": requested,
        "seconds": whole,
    }


def _config(num_rows: int, **options: Any) -> EngineConfig:
    sizes = {"max_num_seqs": min(512, num_rows), "max_num_batched_tokens": 8192}
    return EngineConfig(**sizes, kv_cache_memory_bytes=KV_BYTES, **options)


def _transformers(own: Any, prompts: Sequence[Sequence[Segment]], batch_size: int) -> dict[str, Any]:
    """`generate` over left-padded batches. Two batches are timed."""
    rows = [[t for s in prompt for t in s.token_ids] for prompt in prompts[: 2 * batch_size]]

    def batch(part: Sequence[list[int]]) -> None:
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in part], device=CUDA)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part], device=CUDA)
        own.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=NUM_NEW,
            max_new_tokens=NUM_NEW,
            pad_token_id=0,
        )

    batch(rows[:2])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for first in range(0, len(rows), batch_size):
        batch(rows[first : first + batch_size])
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"batch_size": batch_size, "rows_per_second": len(rows) / seconds}


def _profile(model: TreeModel, prompts: Sequence[Any]) -> list[str]:
    """The kernels that take most time, in prefill and in decoding."""
    from torch.profiler import ProfilerActivity, profile

    lines = []
    for name, num_new in (("prefill", 1), ("decode", 9)):
        engine = Engine(model, _config(len(prompts), mask="segment"))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            engine.generate(prompts, SamplingParams(max_tokens=num_new, ignore_eos=True))
            torch.cuda.synchronize()
        events = sorted(seen.key_averages(), key=lambda each: -each.self_device_time_total)
        total = sum(each.self_device_time_total for each in events) / 1e3
        lines.append(f"{name}: {engine.stats.num_steps} steps, {total:.1f} ms of kernels")
        lines += [
            f"  {each.self_device_time_total / 1e3:8.2f} ms {each.count:6d} x {each.key[:90]}" for each in events[:14]
        ]
    return lines


def _seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """The median time, by the clock of the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def _rows_of(found: dict[str, Any]) -> float:
    return found["rows_per_second"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="throughput and limits of a card")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", action="store_true", help="append a line to RESULTS.md")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[64, 128])
    return parser.parse_args()


if __name__ == "__main__":
    main()
