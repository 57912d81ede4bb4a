"""The matrix of bad inputs as a table: number, what it is, what was expected, what came.

    make script RUN=tests/faults/bad_inputs.py

Ends with 1 if anything came otherwise. Jobs are checked as `segue validate` does; rows go through runs of the echo
model, whose answers are compared with its definition.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from bad.cases import OK, is_expected, outcome_of
from bad.jobs import CASES
from bad.parquet import BAD_FILES
from bad.rows import DATASETS, SLOW_DATASETS, Dataset, errors_in
from bad.score_rows import SCORE_DATASETS
from in_process import run
from rich.console import Console
from rich.table import Table
from test_bad_inputs import OUTCOMES, outcome_of_file
from tiny_models import tiny_model, tiny_tokenizer

from segue.pipeline.processes.ray_session import ray_session


class Report:
    """Lines of a table, and whether each is as it should be."""

    def __init__(self) -> None:
        self.table = Table("number", "what", "expected", "got", "seconds")
        self.wrong = 0
        self.lines = 0

    def add(self, number: str, what: str, expected: str, got: str, seconds: float, *, is_right: bool) -> None:
        self.wrong += not is_right
        self.lines += 1
        values = (number, what, expected, got if is_right else f"WRONG: {got}", f"{seconds:.1f}")
        self.table.add_row(*(ascii(value)[1:-1][:110] for value in values))


def jobs(report: Report, folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    os.environ["SEGUE_TINY_MODEL"] = str(folder / "model")
    for number, each in enumerate(CASES):
        started = time.monotonic()
        (place := folder / str(number)).mkdir()
        got = outcome_of(each, place)
        expected = "accepted" if each.wanted == OK else "refused"
        shown = "accepted" if got == OK else got.replace(str(place), "").splitlines()[0]
        report.add(each.number, each.what, expected, shown, time.monotonic() - started, is_right=is_expected(each, got))


def rows(report: Report, folder: Path) -> None:
    with ray_session(num_cpus=2):
        for make in [*DATASETS, *SCORE_DATASETS, *SLOW_DATASETS]:
            dataset = make()
            started = time.monotonic()
            run(dataset.write(folder / dataset.name))
            _add_rows(report, dataset, folder / dataset.name / "out", time.monotonic() - started)


def _add_rows(report: Report, dataset: Dataset, output: Path, seconds: float) -> None:
    got = errors_in(output)
    table = pq.read_table(output, columns=["src_row", dataset.answer])
    answers = dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(dataset.rows):
        is_right = got.get(number, "no row") == row.code and (answers.get(number) is None) == (row.code is not None)
        if (row.number, row.what) in seen and is_right:
            continue  # many rows of one kind
        seen.add((row.number, row.what))
        code = got.get(number, "no row")
        report.add(
            row.number,
            f"{dataset.name}: {row.what}",
            row.code or "answered",
            code or "answered",
            seconds,
            is_right=is_right,
        )


def files(report: Report, folder: Path) -> None:
    for name, (what, file) in BAD_FILES.items():
        started = time.monotonic()
        path = folder / f"{name}.parquet"
        path.write_bytes(file.content())
        got, expected = outcome_of_file(path), OUTCOMES[name]
        report.add(name, what, str(expected), str(got), time.monotonic() - started, is_right=got == expected)


def main() -> int:
    report = Report()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for part in (jobs, files, rows):
            (place := Path(folder) / part.__name__).mkdir()
            part(report, place)
    Console(width=200).print(report.table)
    seconds = time.monotonic() - started
    print(f"{report.lines} inputs in {seconds:.0f} s: {report.lines - report.wrong} as expected, {report.wrong} not")  # noqa: T201
    return report.wrong > 0


if __name__ == "__main__":
    sys.exit(main())
