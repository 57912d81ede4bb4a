"""Every training and test of the study, one after the other. Finished ones are not done again.

    python jobs/examples/mas-study/study.py --data ../shared/data/commonsense
    python jobs/examples/mas-study/study.py --only lookup

Each combination of task, order, arm and seed is a `segue finetune`, a `segue run` that scores the choices of unseen
items, for the paper's tasks another that generates, and an entry in `results.json`, which `report.py` reads. A
training that was killed goes on. Knows folders and the command line of segue.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from make_tasks import write_tasks

HERE = Path(__file__).parent
OUT = HERE / "out"
RESULTS = HERE / "results.json"
TOLD = ("steps", "tokens", "training_seconds", "tokens_per_second", "eval_loss")


@dataclass(frozen=True, slots=True)
class Arm:
    """One training."""

    task: str
    order: str
    arm: str
    seed: int

    @property
    def data(self) -> Path:
        return OUT / "tasks" / self.task / self.order

    @property
    def folder(self) -> Path:
        return OUT / self.task / self.order / f"{self.arm}-{self.seed}"


def main() -> None:
    args = _arguments()
    study = load_study()
    orders = write_tasks(args.data, OUT / "tasks")
    if args.data is None:
        print("no --data: the tasks word and paper need real questions and are left out", file=sys.stderr)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    for arm, part in arms(study, orders):
        if args.only in (None, arm.task) and not any(_is_of(result, arm) for result in results):
            print(f"{arm.task} {arm.order} {arm.arm} seed {arm.seed}", file=sys.stderr)
            results.append(_result(arm, part, study["model"]))
            write_results(results)


def load_study() -> dict[str, Any]:
    """Every setting."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load((HERE / "study.yaml").read_text(encoding="utf-8"))


def write_results(results: Sequence[dict[str, Any]]) -> None:
    """Run every setting; one line of results for each training."""
    lines = ",\n".join(map(json.dumps, results))
    RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def arms(study: dict[str, Any], orders: dict[str, tuple[str, ...]]) -> Iterator[tuple[Arm, dict[str, Any]]]:
    """All settings with their part of the study, ordered by seed: a third of the time trains every combination once."""
    for seed in study["seeds"]:
        for part in (study["order"], study["paper"]):
            for task in part["tasks"]:
                for order in orders.get(task, ()):
                    for arm in part["arms"]:
                        yield Arm(task, order, arm, seed), part


def _result(arm: Arm, part: dict[str, Any], model: str) -> dict[str, Any]:
    arm.folder.mkdir(parents=True, exist_ok=True)
    settings = part["arms"][arm.arm]
    shared = {"mask": settings["mask"], "prompt": part["prompt"] | settings.get("prompt", {})}
    if "merged_adapter" in settings:
        model = merged(model, HERE / settings["merged_adapter"])
    finetune = {
        "name": "mas-study",
        "model": {"source": model},
        "seed": arm.seed,
        "input": {"path": str(arm.data / "train.parquet")},
        "scoring": {"continuation_column": "output"},
        "lora": part["lora"],
        "training": part["training"],
        "evaluation": {"fraction": 0.04},
        "output": {"path": str(arm.folder / "trained")},
        **shared,
    }
    trained = _segue("finetune", arm.folder / "finetune.yaml", finetune)
    test = {
        "name": "mas-study-test",
        "model": {"source": model, "adapter": trained["adapter"]},
        "input": {"path": str(arm.data / "test.parquet")},
        **shared,
    }
    right = {"choices": _right(arm, "choices", test | {"task": "choose"}, part)}
    if "generate" in part:
        generate = {"task": "generate", "sampling_params": part["generate"]}
        right["generated"] = _right(arm, "generated", test | generate, part)
    lines = [json.loads(line) for line in (arm.folder / "trained" / "metrics.jsonl").read_bytes().splitlines()]
    curve = [(line["step"], round(line["eval_loss"], 4)) for line in lines if "eval_loss" in line]
    return asdict(arm) | {name: trained[name] for name in TOLD} | {"eval_losses": curve, "right": right}


def merged(model: str, adapter: Path) -> str:
    """A folder with adapter and model merged, made once, for the arm that starts from a model that knows the mask."""
    target = OUT / "merged"
    if not target.is_dir():
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from segue.workers.models.source import locate, safetensors_directory

        directory = safetensors_directory(locate(model))
        scratch = OUT / f".merged-{os.getpid()}"
        base = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(scratch)
        AutoTokenizer.from_pretrained(directory).save_pretrained(scratch)
        with suppress(OSError):  # another process has made it
            scratch.rename(target)
    return str(target)


def _right(arm: Arm, name: str, job: dict[str, Any], part: dict[str, Any]) -> dict[str, str]:
    """Run a test. By kind of item: `1` or `0` for each item, in the order of the test file."""
    output = {"path": str(arm.folder / name), "columns": part.get("columns", [])}
    _segue("run", arm.folder / f"{name}.yaml", job | {"output": output})
    from segue.jobs.analysis.evaluate import evaluate
    from segue.jobs.analysis.judge import judging_of

    preset = "commonsense" if job["task"] == "generate" else None
    by = "kind" if "kind" in output["columns"] else None
    _, rows = evaluate(output["path"], judging_of(by=by, label=None, regex=None, preset=preset, ignore_case=False))
    found: dict[str, str] = {}
    for row in rows.sort_by("src_row").to_pylist():
        found[row["group"]] = found.get(row["group"], "") + ("1" if row["correct"] else "0")
    return found


def _segue(command: str, path: Path, job: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(job, indent=1), encoding="utf-8")  # JSON is YAML
    called = [str(Path(sys.executable).with_name("segue")), command, str(path), "--json"]
    done = subprocess.run(called, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # progress goes to stderr


def _is_of(result: dict[str, Any], arm: Arm) -> bool:
    return all(result[name] == value for name, value in asdict(arm).items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the segment mask against causal attention")
    parser.add_argument("--data", type=Path, help="folder with the four tasks in LLM-Adapters' format")
    parser.add_argument("--only", help="only this task")
    return parser.parse_args()


if __name__ == "__main__":
    main()
