"""The study's results so far: tables with intervals and paired tests, and pictures of the losses.

    python jobs/examples/mas-study/report.py           tables, as Markdown
    python jobs/examples/mas-study/report.py --curves  also losses.png, beside the results

Knows `results.json` only.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segue.jobs.analysis.statistics import Z_95, mcnemar, wilson_interval

HERE = Path(__file__).parent
BASE_ARM = "causal"
ARMS = (BASE_ARM, "segment", "segment_adapted", "causal_twice")
COLUMNS = (
    *("task", "order", "test", "items", "arm", "seeds", "accuracy, 95%", "by seed"),
    *("minus causal, 95%", "McNemar p by seed", "tokens trained on"),
)
Result = dict[str, Any]
Key = tuple[str, str, str, str]  # task, order, test, kind of item


def main() -> None:
    parser = argparse.ArgumentParser(description="tables of results.json")
    parser.add_argument("--curves", action="store_true", help="draw losses.png")
    args = parser.parse_args()
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    print("\n".join(table(results)))
    if args.curves:
        draw_curves(results, HERE / "losses.png")


def table(results: Sequence[Result]) -> list[str]:
    """One line for each arm of each test."""
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    for key, by_arm in _grouped(results).items():
        task, order, test, kind = key
        for arm in ARMS:
            seeds = by_arm.get(arm, {})
            if not seeds:
                continue
            runs = [_bits(seeds[seed], test, kind) for seed in sorted(seeds)]
            shares = [statistics.mean(run) for run in runs]
            tokens = statistics.mean(result["tokens"] for result in seeds.values())
            name = task if kind == "all" else kind
            cells = [name, order, test, len(runs[0]), arm, len(runs), _accuracy(runs), _listed(shares)]
            lines.append(_row([*cells, *_against(by_arm.get(BASE_ARM, {}), seeds, test, kind), f"{tokens:,.0f}"]))
    return lines


def paired_difference(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> tuple[float, float]:
    """How much more often `second` is right, and half of its 95% interval: over items, each seen by all seeds.

    Items are the sample; what another seed would change is not in it.
    """
    differences = [
        statistics.mean(b) - statistics.mean(a)
        for a, b in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True)
    ]
    return statistics.mean(differences), Z_95 * statistics.stdev(differences) / math.sqrt(len(differences))


def draw_curves(results: Sequence[Result], path: Path) -> None:
    """Held-out loss by step, with a panel for each task and order and a line for each training."""
    from matplotlib.figure import Figure

    panels = sorted({(result["task"], result["order"]) for result in results})
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    colours = dict(zip(ARMS, ("tab:blue", "tab:orange", "tab:red", "tab:green"), strict=True))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for result in results:
            if (result["task"], result["order"]) == panel:
                label = result["arm"] if result["seed"] == 0 else None
                axes.plot(*zip(*result["eval_losses"], strict=True), color=colours[result["arm"]], label=label)
        axes.set_title(", ".join(panel).replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("held-out loss, nats an answer token")
    figure.savefig(path, dpi=110)


def _grouped(results: Sequence[Result]) -> dict[Key, dict[str, dict[int, Result]]]:
    """The results by what is compared: {key: {arm: {seed: result}}}."""
    groups: dict[Key, dict[str, dict[int, Result]]] = {}
    for result in results:
        for test, kinds in result["right"].items():
            for kind in kinds:
                arms = groups.setdefault((result["task"], result["order"], test, kind), {})
                arms.setdefault(result["arm"], {})[result["seed"]] = result
    return dict(sorted(groups.items()))


def _accuracy(runs: Sequence[Sequence[int]]) -> str:
    """The mean over seeds. Its interval counts each item once, because seeds share the items."""
    share = statistics.mean(statistics.mean(run) for run in runs)
    low, high = wilson_interval(round(share * len(runs[0])), len(runs[0]))
    return f"{share:.3f} ({low:.3f} to {high:.3f})"


def _against(base: dict[int, Result], seeds: dict[int, Result], test: str, kind: str) -> tuple[str, str]:
    """The difference and the p-values over the seeds that both arms have."""
    both = sorted(base.keys() & seeds.keys())
    if not both or base == seeds:
        return "", ""
    first, second = ([_bits(side[seed], test, kind) for seed in both] for side in (base, seeds))
    difference, half = paired_difference(first, second)
    p_values = [
        mcnemar(
            sum(a > b for a, b in zip(one, other, strict=True)), sum(a < b for a, b in zip(one, other, strict=True))
        )
        for one, other in zip(first, second, strict=True)
    ]
    return f"{difference:+.3f} ± {half:.3f}", ", ".join(f"{p:.2g}" for p in p_values)


def _bits(result: Result, test: str, kind: str) -> list[int]:
    return [int(bit) for bit in result["right"][test][kind]]


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.3f}" for share in shares)


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
