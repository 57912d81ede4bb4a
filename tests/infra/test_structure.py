"""Limits that keep the code easy to read: modules in a folder, lines in a file, no circle of imports, types checked.

Knows files and imports; no behaviour.
"""

import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
PACKAGES = ("attention", "workers", "pipeline", "jobs")
MAX_MODULES = 15
MAX_LINES = 350
FILES = [path.relative_to(ROOT) for folder in (*PACKAGES, "segue", "tests") for path in (ROOT / folder).rglob("*.py")]


def test_structure_no_folder_has_too_many_modules() -> None:
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_structure_no_file_has_too_many_lines() -> None:
    counts = {path: len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert {str(path): count for path, count in counts.items() if count > MAX_LINES} == {}


def test_structure_no_files_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph("segue", cache_dir=None)
    assert len(graph.modules) > 100
    # Raises CycleError, which names the files of a circle.
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_structure_types_of_every_package_are_checked() -> None:
    """Pyright does not follow the links of `segue/` unless they are named."""
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["include"]
    assert {f"segue/{package}" for package in PACKAGES} <= set(checked)
