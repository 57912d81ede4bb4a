"""What the documents name exists: files, functions in files, rooms, make targets, modules that are run, links.

Knows how the documents write them: a path in backticks from the root of the repository, or `path: name` for a function,
a class or a method of that file. No behaviour of anything that they describe.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md")
PACKAGES = ("attention", "workers", "pipeline", "jobs")
_PATH = re.compile(r"`((?:attention|workers|pipeline|jobs|infra|tests|segue|\.ci)/[\w./*-]*)(?:: ([\w.]+))?`")
_WAYS = {"A row's way": 15, "A prompt's way": 12}  # sections of DESIGN.md, and the stops that each may have


def lines_of(document: str) -> list[str]:
    return (ROOT / document).read_text(encoding="utf-8").splitlines()


def section(document: str, title: str) -> str:
    """Of a second-level heading that has `title` in it. Fails if there is none."""
    parts = re.split(r"^## (.*)$", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [text for heading, text in zip(parts[1::2], parts[2::2], strict=True) if title in heading]
    assert len(found) == 1, f"{document} has {len(found)} sections '{title}', wanted one"
    return found[0]


def names_in(path: Path) -> set[str]:
    """Functions, classes and constants of a Python file, and `Class.method`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in tree.body for name in _defined(node)}


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        yield node.name
        yield from (f"{node.name}.{name}" for inner in node.body for name in _defined(inner))
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def missing(path: str, name: str | None) -> str | None:
    """What of `path: name` is not there."""
    if "*" in path:
        return None if any(ROOT.glob(path)) else f"no file matches {path}"
    file = ROOT / path
    if not file.exists():
        return f"{path} does not exist"
    if name is None:
        return None
    if file.suffix != ".py":
        return None if re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) else f"{path} has no {name}"
    return None if name in names_in(file) else f"{path} has no {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_functions_in_backticks_exist(document: str) -> None:
    problems = [
        f"{document}:{number}: {problem}"
        for number, line in enumerate(lines_of(document), 1)
        for path, name in _PATH.findall(line)
        if (problem := missing(path, name or None))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("title", "most"), _WAYS.items())
def test_every_stop_of_a_way_is_a_file_and_a_function(title: str, most: int) -> None:
    stops = re.findall(r"^\d+\. (.*(?:\n   .*)*)", section("DESIGN.md", title), re.MULTILINE)
    assert 5 <= len(stops) <= most
    assert [stop for stop in stops if not any(name for _, name in _PATH.findall(stop))] == []


def test_design_has_every_room_and_every_module_beside_the_rooms() -> None:
    rooms = section("DESIGN.md", "Rooms")
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("[a-z]*")):
            if path.suffix == ".py" or (path / "__init__.py").is_file():
                assert f"`{path.stem}`" in rooms, f"{path.relative_to(ROOT)} is not in the tables of rooms"


def test_design_has_the_order_of_rooms_that_the_contracts_hold() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    orders = [contract["layers"] for contract in contracts if contract["name"].startswith("rooms of")]
    assert len(orders) == len(PACKAGES)
    rooms = " ".join(section("DESIGN.md", "Rooms").split())
    for order in orders:
        assert " > ".join(order) in rooms, f"the tables of rooms lack: {' > '.join(order)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_links_lead_somewhere(document: str) -> None:
    text = "\n".join(lines_of(document))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^\s*)make ([a-z][a-z-]+)\b", text, re.MULTILINE)) <= targets
    for module in set(re.findall(r"python -m (segue[\w.]*)", text)):
        if module.endswith(".NAME"):
            continue
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for link in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
        assert (ROOT / link).exists(), link
