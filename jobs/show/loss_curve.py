"""The loss of a training as a picture. Knows the metrics file of a training; needs matplotlib (extra `finetune`)."""

from pathlib import Path

from segue.pipeline.ledger.training_metrics import read_metrics
from segue.pipeline.storage.folder import LocalStore

FILE_NAME = "loss.png"
SMOOTHED_STEPS = 20


def draw_loss_curve(output: str) -> str | None:
    """Write `loss.png` into the output folder of a training and return its path. None before the first step."""
    lines = read_metrics(LocalStore(output))
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    if not steps:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    numbers, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes.plot(numbers, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(numbers, _smoothed(losses), color="tab:blue", label=f"mean of the last {SMOOTHED_STEPS} steps")
    if evaluations:
        held_out = [line["step"] for line in evaluations], [line["eval_loss"] for line in evaluations]
        axes.plot(*held_out, color="tab:orange", marker="o", markersize=3, label="held-out examples")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats an answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    path = str(Path(output) / FILE_NAME)
    figure.savefig(path, dpi=150)
    return path


def _smoothed(values: list[float]) -> list[float]:
    means = []
    for stop in range(1, len(values) + 1):
        window = values[max(0, stop - SMOOTHED_STEPS) : stop]
        means.append(sum(window) / len(window))
    return means
