"""The README's commands and code, run as they are written; its numbers, compared with what the commands print.

Fast: a few `segue` lines with the echo model, the Python block with the embedded one. Slow: every line as written.
Knows the README's form, blocks fenced as sh or python and one command a line; no behaviour beyond exit codes and JSON.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SEGUE = str(Path(sys.executable).with_name("segue"))
ECHO = ["--set", "model.source=echo", "--limit", "7"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The arguments of each line that calls `program`, comments left out."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


def redirected(args: Sequence[str], folder: Path, *, extra: Sequence[str] = ()) -> list[str]:
    """The same command writing, or looking, below `folder` instead of the checkout."""
    if args[0] not in ("run", "plan", "validate", "errors"):
        return list(args)
    if args[0] == "errors":
        return ["errors", str(folder / args[1]), *args[2:]]
    words = [*args, *extra]
    if "--output" in words:
        place = words.index("--output") + 1
        words[place] = str(folder / words[place])
        return words
    return [*words, "--output", str(folder / Path(args[1]).parent / "out")]


def segue(args: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SEGUE, *args], cwd=ROOT, capture_output=True, text=True, timeout=580, stdin=subprocess.DEVNULL
    )


def last_line(result: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def run_all(folder: Path, *, extra: Sequence[str] = ()) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every `segue` line once, in order; all must succeed."""
    results: dict[str, subprocess.CompletedProcess[str]] = {}
    for args in commands("segue"):
        result = segue(redirected(args, folder, extra=extra))
        assert result.returncode == 0, (args, result.stderr[-2000:])
        results.setdefault(shlex.join(args), result)
    return results


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


def test_design_names_modules_and_tests_that_exist_and_leaves_no_module_out() -> None:
    design = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:attention|workers|pipeline|jobs|infra|tests)/[\w/]*\.\w+)`", design):
        assert (ROOT / path).is_file(), path
    packages = design.partition("## 3.")[2].partition("## 4.")[0]
    for package in ("attention", "workers", "pipeline", "jobs"):
        for path in (ROOT / package).glob("[a-z]*.py"):
            assert re.search(rf"\b{path.stem}\b", packages), f"{package}/{path.name} is not in the map"


def test_readme_job_file_is_valid_and_asks_what_the_example_asks(tmp_path: Path) -> None:
    from pipeline.config_file import load_job

    (block,) = blocks("yaml")
    (tmp_path / "job.yaml").write_text(block)
    shown, example = load_job(tmp_path / "job.yaml"), load_job(ROOT / "jobs/examples/triage/job.yaml")
    assert (shown.model, shown.sampling_params, shown.workers) == (
        example.model,
        example.sampling_params,
        example.workers,
    )


def test_readme_result_columns_are_those_of_a_shard() -> None:
    from pipeline.results import RESULT_COLUMNS

    (paragraph,) = re.findall(r"^\*\*Results\*\*.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert set(RESULT_COLUMNS) <= set(re.findall(r"`(\w+)`", paragraph))


def test_readme_python_runs_and_prints_what_it_says() -> None:
    (code,) = blocks("python")
    (printed,) = blocks("text")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed


def test_readme_segue_lines_work_with_the_echo_model(tmp_path: Path) -> None:
    fast = [
        args
        for args in commands("segue")
        if args[0] in ("validate", "schema", "errors") or "input.path=bad_rows.parquet" in args
    ]
    assert {args[0] for args in fast} == {"validate", "schema", "run", "errors"}
    for args in fast:
        result = segue(redirected(args, tmp_path, extra=ECHO))
        assert result.returncode == 0, (args, result.stderr[-2000:])
        assert json.loads(result.stdout if args == ["schema"] else result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_readme_segue_lines_work_as_written_and_give_its_numbers(tmp_path: Path) -> None:
    results = run_all(tmp_path)
    shown = {int(number.replace(",", "")) for number in re.findall(r"\d+,\d{3}", README)}
    plans = {name: last_line(result) for name, result in results.items() if name.startswith("plan ")}
    measured = {plan[key] for plan in plans.values() for key in ("tokens_requested", "tokens_distinct")}
    triage = plans["plan jobs/examples/triage/job.yaml"]
    assert shown == measured | {triage["tokens_distinct"] + triage["extra_tokens_bound"]}
    errors = last_line(results["errors out-bad"])["errors"]
    assert sum(errors.values()) > 0
    causal, segment = (last_line(r) for n, r in results.items() if "mask=" in n and n.startswith("run "))
    assert causal["status"] == segment["status"] == "done"
    assert causal["tokens_generated"] < segment["tokens_generated"]  # the unadapted model seldom stops by itself


@pytest.mark.slow
def test_readme_run_again_does_nothing_and_says_so(tmp_path: Path) -> None:
    run = next(args for args in commands("segue") if args[0] == "run" and "multi_turn" in args[1])
    first = segue(redirected(run, tmp_path))
    again = segue(redirected(run, tmp_path))
    assert (last_line(first)["status"], last_line(again)["status"]) == ("done", "already_complete")
    assert last_line(again)["rows_this_run"] == 0
