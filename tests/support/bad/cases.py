"""What a case of the bad-input matrix is, and what comes of it. Each makes one wrong thing in a folder that otherwise
holds a good job."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ready_jobs import ready_job

from segue.pipeline.ledger.completeness import check_unused
from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.problems import JobRefused
from segue.pipeline.ready.job import existing_manifest

OK = ""  # what a case that must pass expects


@dataclass(frozen=True)
class Case:
    """One wrong thing: `make` puts it into a folder with a good dataset and returns the job file."""

    number: str
    what: str
    make: Callable[[Path], Path]
    wanted: str  # a regular expression of the refusal, or OK


class Cases(list[Case]):
    """The cases of one subject."""

    def case(self, number: str, what: str, wanted: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
        """The decorated function is a case."""

        def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
            self.append(Case(number, what, make, wanted))
            return make

        return add

    def cases(self, number: str, what: str, wanted: str, sections: list[dict[str, Any]]) -> None:
        """Several job files that are wrong in one way."""
        for changes in sections:
            shown = json.dumps(changes, ensure_ascii=True)[:60]
            make = lambda folder, changes=changes: job(folder, **changes)  # noqa: E731
            self.append(Case(number, f"{what}: {shown}", make, wanted))


def write(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def good(folder: Path) -> None:
    """What each case begins with."""
    write(folder / "in" / "a.parquet", {"prompt": ["one", "two", "three"], "id": [1, 2, 3]})


def job(folder: Path, **sections: Any) -> Path:
    values = {"name": "job", "model": {"source": "echo"}, "input": {"path": "in"}, "output": {"path": "out"}} | sections
    return text_job(folder, json.dumps(values))


def text_job(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def outcome_of(each: Case, folder: Path) -> str:
    """What came: "" if the job may start, else the refusal; anything else is raised."""
    good(folder)
    try:
        ready = ready_job(each.make(folder))
        if existing_manifest(ready) is None:
            check_unused(ready.store)
    except (JobRefused, ForeignOutput) as refused:
        return str(refused)
    return OK


def is_expected(each: Case, got: str) -> bool:
    return got == OK if each.wanted == OK else bool(got) and re.search(each.wanted, got) is not None
