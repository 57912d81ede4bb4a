"""Every training and test of the study, one after the other; what is done is not done again.

    python jobs/examples/mas-study/study.py --data ../shared/data/commonsense
    python jobs/examples/mas-study/study.py --report          only the table of what is done

Each combination of task, order, arm and seed is a `segue finetune`, a `segue run` that scores the choices of 1,000
unseen items, and an entry in `results.json`. Knows folders and the command line of segue; nothing of models.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from make_tasks import ORDERS, write_tasks
from ruamel.yaml import YAML

HERE = Path(__file__).parent
OUT = HERE / "out"
RESULTS = HERE / "results.json"


@dataclass(frozen=True, slots=True)
class Arm:
    """One training."""

    task: str
    order: str
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        return OUT / self.task / self.order / f"{self.arm}-{self.seed}"


def main() -> None:
    args = _arguments()
    study = YAML(typ="safe", pure=True).load((HERE / "study.yaml").read_text(encoding="utf-8"))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    if not args.report:
        tasks = write_tasks(args.data, OUT / "tasks")
        if args.data is None:
            print("no --data: task word needs real questions and is left out", file=sys.stderr)
        for arm in _arms(study, tasks):
            if args.only in (None, arm.task) and not any(_is_of(result, arm) for result in results):
                results.append(_run(arm, study))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """Mean accuracy over seeds, and the range, by task, order and arm."""
    lines = [
        "| task | order | arm | seeds | accuracy | lowest to highest | tokens trained on |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["task"], result["order"], result["arm"]), []).append(result)
    for key, group in sorted(groups.items()):
        accuracies = [result["acc"] for result in group]
        tokens = statistics.mean(result["tokens"] for result in group)
        spread = f"{min(accuracies):.3f} to {max(accuracies):.3f}"
        cells = (*key, len(group), f"{statistics.mean(accuracies):.3f}", spread, f"{tokens:,.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _arms(study: dict[str, Any], tasks: list[str]) -> Iterator[Arm]:
    """Seeds first: after a third of the time every combination has been trained once."""
    for seed, task, order, arm in product(study["seeds"], tasks, ORDERS, study["arms"]):
        yield Arm(task, order, arm, seed)


def _run(arm: Arm, study: dict[str, Any]) -> dict[str, Any]:
    arm.folder.mkdir(parents=True, exist_ok=True)
    data = OUT / "tasks" / arm.task / arm.order
    settings = study["arms"][arm.arm]
    shared = {"mask": settings["mask"], "prompt": {"prompt_column": settings["prompt"]}}
    finetune = {
        "name": "mas-study",
        "model": {"source": study["model"]},
        "seed": arm.seed,
        "input": {"path": str(data / "train.parquet")},
        "scoring": {"continuation_column": "answer"},
        "lora": study["lora"],
        "training": study["training"],
        "evaluation": {"fraction": 0.05, "max_examples": 96},
        "output": {"path": str(arm.folder / "trained")},
        **shared,
    }
    trained = _segue("finetune", arm.folder / "finetune.yaml", finetune)
    test = {
        "name": "mas-study-test",
        "task": "choose",
        "model": {"source": study["model"], "adapter": trained["adapter"]},
        "input": {"path": str(data / "test.parquet")},
        "output": {"path": str(arm.folder / "tested"), "columns": ["choices", "label"]},
        **shared,
    }
    _segue("run", arm.folder / "test.yaml", test)
    evaluation = _json(["evaluate", str(arm.folder / "tested"), "--json"])
    (group,) = evaluation["groups"]
    told = {name: trained[name] for name in ("steps", "tokens", "training_seconds", "tokens_per_second", "eval_loss")}
    return asdict(arm) | {"acc": group["acc"], "acc_interval": group["acc_interval"], "n": group["n"]} | told


def _segue(command: str, path: Path, job: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(job, indent=1), encoding="utf-8")  # JSON is YAML
    return _json([command, str(path), "--json"])


def _json(arguments: list[str]) -> dict[str, Any]:
    """The last line that the command prints. Its progress goes to stderr, as does ours."""
    command = [str(Path(sys.executable).with_name("segue")), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _is_of(result: dict[str, Any], arm: Arm) -> bool:
    return all(result[name] == value for name, value in asdict(arm).items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="the segment mask against causal attention, by order of the prompt's parts"
    )
    parser.add_argument("--data", type=Path, help="folder with the ARC files in LLM-Adapters' format, for task word")
    parser.add_argument("--only", help="only this task")
    parser.add_argument("--report", action="store_true", help="only print what is done")
    return parser.parse_args()


if __name__ == "__main__":
    main()
