"""Random schedules for an engine, from a seed: rows of all kinds that come, are aborted and are interrupted."""

import random
from dataclasses import dataclass, field

import torch

from segue.attention.segments import Segment
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import EngineRow, GenerationRequest, LogitsRequest, ScoringRequest

ERRORS = {
    "ctrl-c": KeyboardInterrupt,
    "failure": lambda: RuntimeError("a device that fails"),
    "no memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
}

Row = EngineRow | LogitsRequest


@dataclass(frozen=True)
class Interrupt:
    """An exception in a call that belongs to a step: of `add`, `abort` or `step`."""

    call: str
    at_line: int
    error: str


@dataclass
class Schedule:
    """What happens at which step."""

    seed: int
    config: dict[str, object]
    budget_tokens: int
    unshared_tokens: int
    min_piece_tokens: int
    rows: list[Row]
    arrivals: list[int]  # the step before which each row is added
    aborts: dict[int, set[int]] = field(default_factory=dict)
    interrupts: dict[int, Interrupt] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            f"  {index} at {at}: {row}" for index, (at, row) in enumerate(zip(self.arrivals, self.rows, strict=True))
        ]
        head = f"seed {self.seed}: {self.config}, {self.budget_tokens} tokens of KV memory"
        limits = f"unshared {self.unshared_tokens}, pieces {self.min_piece_tokens}"
        return "\n".join([head, limits, *rows, f"aborts {self.aborts}", f"interrupts {self.interrupts}"])


def schedule_of(seed: int) -> Schedule:
    """The schedule of a seed: always the same."""
    rng = random.Random(seed)
    num_seqs = rng.choice([1, 2, 3, 5, 8, 64])
    config = {
        "mask": rng.choice(["segment", "causal"]),
        "max_num_seqs": num_seqs,
        "max_num_batched_tokens": max(num_seqs, rng.choice([1, 7, 16, 40, 2048])),
        "enable_prefix_caching": rng.random() < 0.75,
        "max_model_len": rng.choice([None, None, 60]),
    }
    budget = rng.choice([rng.randrange(5, 60), rng.randrange(40, 160), rng.randrange(100, 400), 4000])
    rows = _rows(rng)
    last = rng.choice([1, 6, 25])
    schedule = Schedule(
        seed, config, budget, rng.choice([4096, 30]), rng.choice([64, 4]), rows, [rng.randrange(last) for _ in rows]
    )
    for _ in range(rng.choice([0, 0, 1, 3])):
        schedule.aborts[rng.randrange(30)] = {rng.randrange(len(rows)) for _ in range(rng.randrange(1, 4))}
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        call = rng.choice(["add", "abort", "step", "step", "step", "step"])
        line = int(10 ** rng.uniform(0, 3.5))
        schedule.interrupts[rng.randrange(30)] = Interrupt(call, line, rng.choice([*ERRORS, "ctrl-c"]))
    return schedule


def _rows(rng: random.Random) -> list[Row]:
    """Some of them equal; many share a beginning, at segments' borders and inside causal runs."""
    shared = [_segment(rng, rng.randrange(1, 30)) for _ in range(3)]
    rows: list[Row] = []
    for _ in range(rng.choice([1, 2, 4, 7, 11])):
        if rows and rng.random() < 0.1:
            rows.append(rng.choice(rows))
            continue
        beginning = shared[: rng.randrange(4)] if rng.random() < 0.7 else []
        own = [_segment(rng, rng.randrange(1, 12)) for _ in range(rng.randrange(0 if beginning else 1, 3))]
        rows.append(_row(rng, (*beginning, *own)))
    return rows


def _segment(rng: random.Random, length: int) -> Segment:
    """Of few tokens, so that causal runs part anywhere."""
    return Segment(tuple(rng.choice((3, 3, 3, 4, 5)) for _ in range(length)), rng.random() < 0.5)


def _row(rng: random.Random, segments: tuple[Segment, ...]) -> Row:
    kind = rng.random()
    if kind < 0.55:
        return GenerationRequest(segments, _params(rng), str(rng.randrange(4)).encode())
    if kind < 0.85:
        continuation = tuple(rng.choice((3, 3, 4)) for _ in range(rng.randrange(1, 7)))
        return ScoringRequest(segments, continuation, is_shared=rng.random() < 0.75)
    return LogitsRequest(segments)


def _params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice([1, 2, 5, 12, 20, 40])
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3, 5, 8]),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, max_tokens // 2]),
        temperature=rng.choice([0.0, 0.0, 0.9]),
        top_k=rng.choice([0, 0, 9]),
        seed=rng.choice([None, None, 7]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice([(), (), (3, 70, 140, 210)]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logprobs=rng.choice([None, None, 2]),
    )
