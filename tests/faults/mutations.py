"""The suite has to fail for each of these changes to the commit protocol; says which test does.

    python tests/faults/mutations.py

Each is made in a copy of the repository, in which the tests named beside it are run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("attention", "workers", "pipeline", "jobs", "tests", "pyproject.toml", "README.md", "DESIGN.md")


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in a file."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (  # a table: its rows look alike because they are one kind of thing
    Mutation(
        "rename for link", "pipeline/storage/folder.py", "os.link(temporary, target)", "os.replace(temporary, target)",
        "tests/pipeline/storage/test_store.py tests/faults/test_crash_points.py",
    ),
    Mutation(
        "no If-None-Match", "pipeline/storage/bucket.py", 'content, mode="create", ', "content, ",
        "tests/pipeline/storage/test_object_store.py",
    ),
    Mutation(
        "names of shards with a uuid", "pipeline/ledger/units.py", 'f"part-{self.ordinal:06d}-{self.unit_id}.parquet"',
        'f"part-{self.ordinal:06d}-{__import__(\'uuid\').uuid4().hex[:16]}.parquet"',
        "tests/pipeline/ledger/test_units_shards.py tests/faults/test_crash_points.py",
    ),
    Mutation(
        "rows with an error are dropped", "pipeline/ledger/columns.py",
        "    columns = [\n        passed[field.name]",
        "    rows = [row for row in rows if not row.get('error')]\n    columns = [\n        passed[field.name]",
        "tests/pipeline/ledger/test_units_shards.py tests/pipeline/run/test_run.py",
    ),
    Mutation(
        "what is there is not read back after a 412", "pipeline/storage/bucket.py",
        "return self._is_ours(name, content)", "return False",
        "tests/pipeline/storage/test_object_store.py",
    ),
    Mutation(
        "files are not synced", "pipeline/storage/folder.py", "        os.fsync(file.fileno())\n", "",
        "tests/faults/test_crash_points.py",
    ),
    Mutation(
        "folders are not synced", "pipeline/storage/folder.py", "        os.fsync(descriptor)\n", "        pass\n",
        "tests/faults/test_crash_points.py",
    ),
)  # fmt: skip


def main() -> int:
    survivors = []
    for mutation in MUTATIONS:
        with tempfile.TemporaryDirectory() as folder:
            killer = _killer(mutation, Path(folder))
        print(f"{mutation.name}: {killer or 'NO TEST FAILS'}", flush=True)
        survivors += [] if killer else [mutation.name]
    return int(bool(survivors))


def _killer(mutation: Mutation, folder: Path) -> str | None:
    """The first test that fails."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "out*"))
        else:
            shutil.copy(source, folder / name)
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} has {text.count(mutation.old)} places for it, wanted 1")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    # The copy comes first on the path, before the repository that is installed.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split()]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else None


if __name__ == "__main__":
    sys.exit(main())
