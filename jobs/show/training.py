"""What `segue finetune` prints for people: progress on stderr while it trains, and the result at its end."""

import sys
import time
from typing import Any

from segue.jobs.show.lines import console, plain
from segue.pipeline.train.finetune import FinetuneSummary

LINE_SECONDS = 10.0


class TrainingDisplay:
    """Called with each line of the metrics. Prints every evaluation on held-out examples, and a step every
    LINE_SECONDS."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._shown_at = 0.0

    def __call__(self, line: dict[str, Any]) -> None:
        if self._quiet:
            return
        is_evaluation = "eval_loss" in line
        if not is_evaluation and time.monotonic() - self._shown_at < LINE_SECONDS and line["step"] < line["num_steps"]:
            return
        self._shown_at = time.monotonic() if not is_evaluation else self._shown_at
        print(evaluation_line(line) if is_evaluation else step_line(line), file=sys.stderr, flush=True)


def step_line(line: dict[str, Any]) -> str:
    """The metrics of one step as text."""
    minutes, seconds = divmod(round(line["seconds_left"]), 60)
    return (
        f"step {line['step']:,}/{line['num_steps']:,} | loss {line['loss']:.4f} | "
        f"{line['tokens_per_second']:,.0f} tokens/s | {minutes}:{seconds:02d} left"
    )


def evaluation_line(line: dict[str, Any]) -> str:
    """The metrics of one evaluation on the held-out examples as text."""
    return f"step {line['step']:,}: held-out loss {line['eval_loss']:.4f}" + (", the best" if line["is_best"] else "")


def show_training(summary: FinetuneSummary, picture: str | None) -> None:
    """Print a training in a few lines; `picture` is the path of its loss curve."""
    out = console()
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
