"""What a model and a dataset need of a card, before anybody rents one: memory, rows in flight, limits by the roofline.

    weights   = parameters * bytes of the precision
    kv        = share of the card (GPU_KV_SHARE) - weights
    kv_tokens = kv / (2 * layers * key heads * head width * bytes)
    rows      = kv_tokens / (own tokens of a row + tokens it generates), at most max_num_seqs
    prefill   = matrix rate / (2 * parameters)                                tokens/s, if arithmetic is the limit
    step      = (weights + keys and values of all rows) / memory bandwidth    seconds, if memory is the limit
    decode    = rows / step                                                   tokens/s

These are limits, not promises: a run reaches a part of them. Attention's own arithmetic is left out, and of a mixture
of experts all weights are counted. Knows numbers only.
"""

from dataclasses import dataclass

from segue.workers.devices.memory import GPU_KV_SHARE

GB = 10**9


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, as its maker's data sheet describes it."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes a second
    flops: float  # dense bf16 operations a second; of a T4 fp16


CARDS = {
    card.name: card
    for card in (
        Card("T4", 16 * GB, 0.320e12, 65e12),
        Card("A10G", 24 * GB, 0.600e12, 70e12),
        Card("L4", 24 * GB, 0.300e12, 121e12),
        Card("L40S", 48 * GB, 0.864e12, 362e12),
        Card("A100-40GB", 40 * GB, 1.555e12, 312e12),
        Card("A100-80GB", 80 * GB, 2.039e12, 312e12),
        Card("H100-80GB", 80 * GB, 3.350e12, 989e12),
        Card("H200-141GB", 141 * GB, 4.800e12, 989e12),
        Card("B200-180GB", 180 * GB, 7.700e12, 2250e12),
    )
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """How large a model is in one precision."""

    num_weights: int
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Workload:
    """How much work a plan is."""

    num_rows: int
    tokens_distinct: int  # tokens of prompts that are computed
    max_tokens: int  # that a row generates, at most
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The results of the formulas above."""

    card: str
    weight_bytes: int
    kv_bytes: int  # 0 if the weights leave no room
    kv_tokens: int
    rows_in_flight: int
    prefill_tokens_per_second: float
    decode_step_seconds: float
    decode_tokens_per_second: float
    seconds: float  # of the whole plan at these limits, on one card


def memory_plan(card: Card, model: ModelSize, work: Workload) -> MemoryPlan:
    """The plan for a worker that has a whole card. Raises ValueError if not even one row fits beside the weights."""
    kv_bytes = int(GPU_KV_SHARE * card.memory_bytes) - model.weight_bytes
    own_tokens = -(-work.tokens_distinct // max(1, work.num_rows)) + work.max_tokens
    kv_tokens = max(0, kv_bytes) // model.kv_bytes_per_token
    rows = min(work.max_num_seqs, max(1, work.num_rows), kv_tokens // max(1, own_tokens))
    if rows < 1:
        raise ValueError(
            f"{card.name}: {model.weight_bytes:,} bytes of weights leave room for {kv_tokens:,} tokens of keys and "
            f"values within {GPU_KV_SHARE:.0%} of {card.memory_bytes:,} bytes, a row has about {own_tokens:,}: take a "
            "larger card, or workers.num_gpus above 1"
        )
    prefill = card.flops / (2 * model.num_weights)
    step = (model.weight_bytes + rows * own_tokens * model.kv_bytes_per_token) / card.bandwidth
    generated = work.num_rows * work.max_tokens
    return MemoryPlan(
        card=card.name,
        weight_bytes=model.weight_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        rows_in_flight=rows,
        prefill_tokens_per_second=prefill,
        decode_step_seconds=step,
        decode_tokens_per_second=rows / step,
        seconds=work.tokens_distinct / prefill + generated / rows * step,
    )
