"""Makes each mutant of `mutants.py` in a copy of the repository, runs its tests, and says which of them fails.

    make script RUN=tests/faults/mutations.py                   all of them
    make script RUN="tests/faults/mutations.py limit seed"      those with one of the words in their name

Ends with 1 if no test fails for one of them, and with a message if a mutant's text is not in its file any more.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("attention", "workers", "pipeline", "jobs", "segue", "tests")
FILES = ("pyproject.toml", "README.md", "DESIGN.md", "Makefile")
SURVIVED, KILLED = 0, 1  # exit codes of pytest; others say nothing about the mutant


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in mutant.name for word in sys.argv[1:])]
    _check_texts(chosen)
    survivors = []
    for mutant in chosen:
        with tempfile.TemporaryDirectory() as folder:
            killer = _killer(mutant, Path(folder))
        print(f"{mutant.name}: {killer or 'NO TEST FAILS'}", flush=True)
        survivors += [] if killer else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are killed")
    return int(bool(survivors))


def _check_texts(mutants: list[Mutant]) -> None:
    """All texts at once, before any test runs."""
    lost = []
    for mutant in mutants:
        try:
            mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            lost.append(str(error))
    if lost:
        raise SystemExit("\n".join(lost))


def _killer(mutant: Mutant, folder: Path) -> str | None:
    """The first test that fails."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "out", "out-*")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    mutant.apply(folder)
    # The copy comes first on the path, before the repository that is installed.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not long and not commands"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [*command, *mutant.tests.split()], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode not in (SURVIVED, KILLED):
        raise SystemExit(f"{mutant.name}: its tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else None


if __name__ == "__main__":
    sys.exit(main())
