"""The study on one GPU, where trainings take seconds. Several processes share the card. Needs no Ray there.

    python on_card.py prepare --data ../shared/data/commonsense items.json.gz      anywhere
    python on_card.py run items.json.gz --model FILE --processes 8 --seconds 400   on the card
    python on_card.py collect part-*.jsonl                                         into results.json

`prepare` turns every row into token ids by the code that plans a job; `run` trains with the loop of `segue finetune`,
then loads model and adapter as a worker of `segue run` does, and scores and generates with its engine. What is not done
when the time is over is left out and can be run later: what `results.json` has is not done again.
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
HELD_OUT = 0.04
KV_BYTES = 2 << 30  # of each process


def prepare(args: argparse.Namespace) -> None:
    """Write the items of every task, order and prompt: `{name: {train, test}}`."""
    from make_tasks import write_tasks
    from study import OUT, load_study

    study = load_study()
    orders = write_tasks(args.data, OUT / "tasks")
    items: dict[str, Any] = {}
    for part in (study["order"], study["paper"]):
        for task in part["tasks"]:
            for order in orders.get(task, ()):
                for settings in part["arms"].values():
                    name = _items_name(task, order, settings)
                    if name not in items:
                        prompt = part["prompt"] | settings.get("prompt", {})
                        items[name] = _encoded(OUT / "tasks" / task / order, prompt, study["model"])
                        print(name, {key: len(value) for key, value in items[name].items()}, file=sys.stderr)
    with gzip.open(args.items, "wt", encoding="utf-8", compresslevel=6) as file:
        json.dump(items, file)


def _encoded(folder: Path, prompt: dict[str, Any], model: str) -> dict[str, Any]:
    import datetime

    import pyarrow.parquet as pq

    from segue.jobs.analysis.judge import PRESETS
    from segue.workers.models.source import locate, safetensors_directory
    from segue.workers.prompts.encoder import PromptEncoder
    from segue.workers.prompts.template import PromptTemplate
    from segue.workers.scoring.pairs import PairEncoder
    from segue.workers.scoring.rows import RowScorer
    from segue.workers.scoring.template import ScoringTemplate

    template = PromptTemplate.model_validate(prompt)
    encoder = PromptEncoder.from_directory(safetensors_directory(locate(model)), template, date=datetime.date.today())
    scoring = ScoringTemplate(continuation_column="output")
    options: dict[str, Any] = {"delimiter": scoring.delimiter(template.format), "max_bytes": 1 << 22}
    pairs = PairEncoder(encoder, encoder.tokenizer)
    learned, chosen = (
        RowScorer(pairs, task, scoring, max_model_len=4096, **options)  # type: ignore[arg-type]
        for task in ("finetune", "choose")
    )
    found: dict[str, Any] = {}
    for part, scorer in (("train", learned), ("test", chosen)):
        found[part] = []
        for row in pq.read_table(folder / f"{part}.parquet").to_pylist():
            read = scorer.read(row, "segment")
            item = {"segments": [[s.token_ids, s.bidirectional] for s in read.context], "tokens": read.continuations}
            if part == "test":
                item |= {"label": read.label, "kind": row.get("kind", "all"), "answer": row.get("answer")}
            found[part].append(item)
    found["answer_end_id"] = [encoder.answer_end_id()]
    found["answer_regex"] = [PRESETS["commonsense"][0]]
    return found


def run(args: argparse.Namespace) -> None:
    """Start the processes. Each takes every n-th arm, and stops when the time is over."""
    from segue.workers.models.source import locate, safetensors_directory

    safetensors_directory(locate(str(args.model)))  # converted once
    deadline = time.time() + args.seconds
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "work", str(args.items), "--model", str(args.model)]
            + ["--share", f"{number}/{args.processes}", "--deadline", str(deadline), "--out", str(args.out)]
            + ["--device", args.device]
            + (["--only", args.only] if args.only else [])
            + (["--max-steps", str(args.max_steps)] if args.max_steps else []),
            env=environment,
        )
        for number in range(args.processes)
    ]
    codes = [process.wait() for process in processes]
    print("exit codes", codes, file=sys.stderr)


def work(args: argparse.Namespace) -> None:
    """One process. Writes a line for each training."""
    from study import arms, load_study

    study = load_study()
    done = set(_known())
    with gzip.open(args.items, "rt", encoding="utf-8") as file:
        items = json.load(file)
    orders: dict[str, tuple[str, ...]] = {}
    for name in items:
        task, order, _ = name.split("/")
        orders[task] = tuple(dict.fromkeys([*orders.get(task, ()), order]))
    number, total = map(int, args.share.split("/"))
    wanted = [
        each
        for each in arms(study, orders)
        if args.only in (None, each[0].task) and _arm_of(asdict(each[0])) not in done
    ]
    longest = 0.0
    with (args.out / f"part-{number}.jsonl").open("a", encoding="utf-8") as out:
        for arm, part in wanted[number::total]:
            started = time.time()
            if started + longest > args.deadline:
                return
            settings = part["arms"][arm.arm]
            result = _result(arm, part, items[_items_name(arm.task, arm.order, settings)], args)
            longest = max(longest, time.time() - started)
            out.write(json.dumps(result) + "\n")
            out.flush()
            told = {name: result[name] for name in ("task", "order", "arm", "seed", "eval_loss", "tokens_per_second")}
            print(f"{longest:.0f} s", told, _shares(result["right"]), file=sys.stderr, flush=True)


def _result(arm: Any, part: dict[str, Any], items: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from segue.attention.segments import canonical_segments
    from segue.workers.engine.engine import Engine
    from segue.workers.rows.params import SamplingParams
    from segue.workers.training.batches import TrainingExample
    from segue.workers.training.checkpoints import Checkpoints
    from segue.workers.training.model import TrainingModel
    from segue.workers.training.params import LoraParams, TrainingParams
    from segue.workers.training.trainer import EvaluationReport, Trainer

    settings = part["arms"][arm.arm]
    mask = settings["mask"]
    end = tuple(items["answer_end_id"])
    source = str(args.model)
    if "merged_adapter" in settings:
        from study import merged

        source = merged(source, HERE / settings["merged_adapter"])
    examples = [
        TrainingExample(canonical_segments(_segments(item), mask=mask), (*item["tokens"][0], *end))
        for item in items["train"]
    ]
    order = Random(f"held out/{arm.seed}").sample(range(len(examples)), len(examples))
    held_out = {*order[: int(HELD_OUT * len(examples))]}
    params = TrainingParams.model_validate(part["training"])
    if args.max_steps:
        params = params.model_copy(update={"max_steps": args.max_steps})
    model = TrainingModel.from_pretrained(
        source, LoraParams.model_validate(part["lora"]), dtype=torch.bfloat16, seed=arm.seed, device=args.device
    )
    trainer = Trainer(
        model,
        [example for number, example in enumerate(examples) if number not in held_out],
        [examples[number] for number in sorted(held_out)],
        params,
        seed=arm.seed,
    )
    curve: list[tuple[int, float]] = []

    def note(event: Any) -> None:
        if isinstance(event, EvaluationReport):
            curve.append((event.step, round(event.eval_loss, 4)))

    with tempfile.TemporaryDirectory() as folder:
        trainer.run(Checkpoints(Path(folder) / "checkpoints"), note)
        model.save_adapter(Path(folder) / "adapter", base_model="")
        del model
        engine = Engine.from_pretrained(
            source,
            mask=mask,
            dtype="bfloat16",
            adapter=str(Path(folder) / "adapter"),
            check_adapter=False,
            device=args.device,
            kv_cache_memory_bytes=KV_BYTES,
            max_num_batched_tokens=4096,
            max_num_seqs=256,
        )
    tests = items["test"]
    scores = iter(engine.loglikelihood([(_segments(t), tokens) for t in tests for tokens in t["tokens"]]))
    right: dict[str, dict[str, str]] = {"choices": {}}
    for test in tests:
        logprobs = [next(scores).logprob for _ in test["tokens"]]
        _note(right["choices"], test["kind"], logprobs.index(max(logprobs)) == test["label"])
    if "generate" in part:
        right["generated"] = {}
        params_ = SamplingParams(**part["generate"])
        for test, output in zip(tests, engine.generate([_segments(t) for t in tests], params_), strict=True):
            found = re.search(items["answer_regex"][0], output.outputs[0].text)
            _note(right["generated"], test["kind"], found is not None and found[0] == test["answer"])
    progress = trainer.progress
    return {
        **asdict(arm),
        "steps": progress.step,
        "tokens": progress.num_tokens,
        "training_seconds": round(progress.seconds, 2),
        "tokens_per_second": round(progress.num_tokens / progress.seconds, 1),
        "eval_loss": trainer.kept_loss,
        "card": torch.cuda.get_device_name() if args.device == "cuda" else "none",
        "eval_losses": curve,
        "right": right,
    }


def collect(args: argparse.Namespace) -> None:
    """Add the results of the processes to results.json. A newer result of a training replaces an older one."""
    from study import write_results

    by_arm = _known()
    for path in args.parts:
        by_arm |= {_arm_of(each): each for each in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    write_results([by_arm[key] for key in sorted(by_arm)])


def _known() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The entries of results.json."""
    from study import RESULTS

    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    return {_arm_of(result): result for result in found}


def _arm_of(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("task", "order", "arm", "seed"))


def _items_name(task: str, order: str, settings: dict[str, Any]) -> str:
    return f"{task}/{order}/{settings.get('prompt', {}).get('prompt_column', 'prompt')}"


def _segments(item: dict[str, Any]) -> list[Any]:
    from segue.attention.segments import Segment

    return [Segment(tuple(ids), bidirectional) for ids, bidirectional in item["segments"]]


def _note(bits: dict[str, str], kind: str, is_right: bool) -> None:
    bits[kind] = bits.get(kind, "") + ("1" if is_right else "0")


def _shares(right: dict[str, dict[str, str]]) -> dict[str, float]:
    return {
        f"{test}/{kind}": round(bits.count("1") / len(bits), 3)
        for test, kinds in right.items()
        for kind, bits in kinds.items()
    }


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the study on one GPU")
    commands = parser.add_subparsers(required=True)
    for name, function in (("prepare", prepare), ("run", run), ("work", work)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("items", type=Path)
        if name == "prepare":
            command.add_argument("--data", type=Path)
            continue
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("--out", type=Path, default=Path("."))
        command.add_argument("--only")
        command.add_argument("--max-steps", type=int)
        command.add_argument("--device", default="cuda")
        if name == "run":
            command.add_argument("--processes", type=int, default=8)
            command.add_argument("--seconds", type=float, default=3600.0)
        else:
            command.add_argument("--share", required=True)
            command.add_argument("--deadline", type=float, required=True)
    command = commands.add_parser("collect")
    command.set_defaults(function=collect)
    command.add_argument("parts", type=Path, nargs="+")
    return parser.parse_args(words)


if __name__ == "__main__":
    arguments = _arguments(sys.argv[1:])
    arguments.function(arguments)
