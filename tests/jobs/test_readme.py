"""The README's commands and code, run as they are written; its numbers, compared with what the commands print.

Fast: the Python block. Slow: every `segue` line, as written if it shows what needs weights, else with the echo model.
Knows the README's form, blocks fenced as sh or python and one command a line; no behaviour beyond exit codes and JSON.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import last_line
from echo_jobs import outcome, segue_process
from ready_jobs import config_of

from segue.pipeline.jobfile.schema import JobConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
READERS = ("errors", "evaluate", "report", "status", "verify")  # of what other lines have written
WRITTEN = {"--output", "--html"}
ECHO = ["--set", "model.source=echo", "--limit", "7"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The arguments of each line that calls `program`, comments left out."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


def redirected(args: Sequence[str], folder: Path, *, extra: Sequence[str] = ()) -> list[str]:
    """The same command writing, or looking, below `folder` instead of the checkout."""
    if args[0] not in ("run", "plan", "validate", *READERS):
        return list(args)
    words = [*args] if args[0] in READERS else [*args, *extra]
    for option in WRITTEN.intersection(words):
        place = words.index(option) + 1
        words[place] = str(folder / words[place])
    if args[0] in READERS:
        return [args[0], str(folder / args[1]), *words[2:]]
    if "--output" in words:
        return words
    return [*words, "--output", str(folder / Path(args[1]).parent / "out")]


def segue(args: Sequence[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    with segue_process(ROOT, *args) as process:
        return outcome(process)


def needs_weights(args: Sequence[str]) -> bool:
    """Whether a line shows something that only the real model's tokenizer can: the plan's numbers."""
    return args[0] == "plan"


def run_lines(folder: Path, *, weights: bool, extra: Sequence[str] = ()) -> dict[str, dict]:
    """Every such `segue` line once; all must succeed. Their JSON by line.

    Two at a time, each with a Ray of its own, then those that read what others have written.
    """
    lines = {shlex.join(args): args for args in commands("segue") if needs_weights(args) == weights}
    readers = {line: args for line, args in lines.items() if args[0] in READERS}
    printed: dict[str, dict] = {}
    for group in ({line: args for line, args in lines.items() if line not in readers}, readers):
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(lambda args: segue(redirected(args, folder, extra=extra)), group.values())
            for (line, args), (code, out, err) in zip(group.items(), results, strict=True):
                assert code == 0, (line, err[-2000:])
                printed[line] = json.loads(out) if args == ["schema"] else last_line(out)
    return printed


def test_readme_opens_with_two_commands_before_anything_else() -> None:
    first = re.search(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert first is not None
    assert len(first[1].splitlines()) == 2
    assert README[: first.start()].count("\n") < 8


def test_readme_make_targets_exist() -> None:
    named = {words[0] for words in commands("make")} | set(re.findall(r"`make ([a-z-]+)`", README))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_readme_demo_is_the_command_that_it_says() -> None:
    demo = re.search(r"^demo:.*\n\t@\$\(BIN\)/segue (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert demo is not None
    assert shlex.split(demo[1])[:2] == commands("segue")[0]


def test_readme_shell_lines_name_no_other_program() -> None:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    assert {words[0] for words in lines if words} == {"make", "segue"}


def test_readme_files_and_folders_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^    (\w+)/ ", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_readme_job_file_is_valid_and_asks_what_the_example_asks(tmp_path: Path) -> None:
    *jobs, _ = blocks("yaml")
    for name, block in zip(("triage", "quiz"), jobs, strict=True):
        (tmp_path / "job.yaml").write_text(block)
        shown, example = _job(tmp_path / "job.yaml"), _job(ROOT / "jobs/examples" / name / "job.yaml")
        for section in ("task", "model", "sampling_params", "scoring", "workers"):
            if section != "workers" or name == "triage":
                assert getattr(shown, section) == getattr(example, section), (name, section)


def _job(path: Path) -> JobConfig:
    """With the adapter as the file names it, relative to itself."""
    job = config_of(path)
    if job.model.adapter is None:
        return job
    adapter = os.path.relpath(job.model.adapter, path.parent)
    return job.model_copy(update={"model": job.model.model_copy(update={"adapter": adapter})})


def test_readme_training_is_valid_and_names_the_defaults(tmp_path: Path) -> None:
    from segue.pipeline.jobfile.read import read_job
    from segue.pipeline.jobfile.training import FinetuneConfig
    from segue.workers.training.params import LoraParams, TrainingParams

    (tmp_path / "ft.yaml").write_text(blocks("yaml")[-1])
    config = read_job(tmp_path / "ft.yaml", (), FinetuneConfig).config
    assert isinstance(config, FinetuneConfig)
    assert (config.lora, config.training) == (LoraParams(), TrainingParams())
    assert {"r", "alpha", "dropout", "target_modules"} == config.lora.model_fields_set


def test_readme_result_columns_are_those_of_a_shard() -> None:
    from segue.pipeline.ledger.columns import RESULT_COLUMNS

    (paragraph,) = re.findall(r"^\*\*Results\*\*.*?\n\n", README, re.MULTILINE | re.DOTALL)
    common = set(re.findall(r"`(\w+)`", paragraph))
    assert set(RESULT_COLUMNS["generate"]) <= common
    for task in ("choose", "loglikelihood", "perplexity"):
        (row,) = re.findall(rf"^\| `{task}` \|.*$", README, re.MULTILINE)
        assert set(RESULT_COLUMNS[task]) - common <= set(re.findall(r"`(\w+)`", row)), task


def test_readme_lists_every_error_code_with_its_meaning() -> None:
    from segue.workers.errors import RowErrorCode

    table = re.findall(r"^\| `([A-Z_0-9]+)` \| (.*) \|$", README, re.MULTILINE)
    assert table == [(code.value, code.meaning) for code in RowErrorCode]


def test_readme_python_runs_and_prints_what_it_says() -> None:
    (code,) = blocks("python")
    (printed,) = blocks("text")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed


@pytest.mark.slow
@pytest.mark.commands
def test_readme_lines_that_need_no_weights_work_with_the_echo_model(tmp_path: Path) -> None:
    printed = run_lines(tmp_path, weights=False, extra=ECHO)
    assert {line.split()[0] for line in printed} == {"run", "validate", *READERS, "schema"}
    finished = [value for line, value in printed.items() if line.startswith("run ")]
    assert [(value["status"], value["rows"]) for value in finished] == [("done", 7)] * len(finished)
    assert sum(printed["errors out-bad"]["errors"].values()) > 0


@pytest.mark.slow
@pytest.mark.commands
def test_readme_plans_on_the_real_model_work_as_written_and_give_its_numbers(tmp_path: Path) -> None:
    printed = run_lines(tmp_path, weights=True)
    shown = {int(number.replace(",", "")) for number in re.findall(r"\d+,\d{3}", README)}
    plans = {line: plan for line, plan in printed.items() if line.startswith("plan ")}
    measured = {plan[key] for plan in plans.values() for key in ("tokens_requested", "tokens_distinct")}
    triage = plans["plan jobs/examples/triage/job.yaml"]
    assert shown == measured | {triage["tokens_distinct"] + triage["extra_tokens_bound"]}
