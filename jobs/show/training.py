"""What `segue finetune` tells people: a line now and then on stderr while it trains, and what came of it."""

import sys
import time
from typing import Any

from rich.console import Console

from segue.jobs.show.tables import plain
from segue.pipeline.train.finetune import FinetuneSummary

LINE_SECONDS = 10.0


class TrainingDisplay:
    """Called with each line of the metrics; a look at held-out examples is always shown."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._shown_at = 0.0

    def __call__(self, line: dict[str, Any]) -> None:
        if self._quiet:
            return
        is_look = "eval_loss" in line
        if not is_look and time.monotonic() - self._shown_at < LINE_SECONDS and line["step"] < line["num_steps"]:
            return
        self._shown_at = time.monotonic() if not is_look else self._shown_at
        print(look_line(line) if is_look else step_line(line), file=sys.stderr, flush=True)


def step_line(line: dict[str, Any]) -> str:
    """One step."""
    minutes, seconds = divmod(round(line["seconds_left"]), 60)
    return (
        f"step {line['step']:,}/{line['num_steps']:,} | loss {line['loss']:.4f} | "
        f"{line['tokens_per_second']:,.0f} tokens/s | {minutes}:{seconds:02d} left"
    )


def look_line(line: dict[str, Any]) -> str:
    """A look at the held-out examples."""
    return f"step {line['step']:,}: held-out loss {line['eval_loss']:.4f}" + (", the best" if line["is_best"] else "")


def show_training(summary: FinetuneSummary, picture: str | None) -> None:
    """The training in a few lines."""
    out = Console(highlight=False, soft_wrap=True)
    stopped = ", stopped early" if summary.stopped_early else ""
    out.print(f"{summary.status.replace('_', ' ')}: {summary.steps:,} of {summary.num_steps:,} steps{stopped}")
    if summary.adapter is not None:
        errors = ", ".join(f"{count} {code}" for code, count in summary.errors.items()) or "none"
        out.print(f"{summary.examples:,} examples, {summary.held_out:,} held out; row errors: {errors}")
        loss = "none held out" if summary.eval_loss is None else f"{summary.eval_loss:.4f} nats an answer token"
        out.print(f"held-out loss: {loss}")
        out.print(
            f"{summary.tokens:,} tokens in {summary.training_seconds:,.0f} s, {summary.tokens_per_second:,.0f} tokens/s"
        )
        out.print(f"model.adapter: {plain(summary.adapter)}")
    if picture is not None:
        out.print(f"loss curve: {plain(picture)}")
