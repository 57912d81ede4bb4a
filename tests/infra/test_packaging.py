"""What is shipped: the wheel's content, one version everywhere, and set-up files that agree with each other.

Builds from a copy, without network. Knows no behaviour of the code.
"""

import re
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("attention", "workers", "pipeline", "jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS: dict[str, str] = {
    canonicalize_name(name): pinned
    for name, pinned in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


def test_wheel_has_every_module_and_every_file_of_the_examples(wheel: Path) -> None:
    wanted = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if not is_left_over(path)}
    wanted |= {*(ROOT / "jobs/templates").iterdir(), *(ROOT / "attention/cpu/cpp").iterdir()}
    wanted |= {path for path in (ROOT / "jobs/examples").rglob("*") if path.is_file() and not is_left_over(path)}
    names = {f"segue/{path.relative_to(ROOT).as_posix()}" for path in wanted}
    names |= {"segue/__init__.py", "segue/__main__.py"}
    assert {"segue/jobs/examples/triage/job.yaml", "segue/jobs/examples/triage/data/tickets-0.parquet"} <= names
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == names


def test_sdist_makes_the_same_wheel(wheel: Path, wheel_of_sdist: Path) -> None:
    assert contents(wheel_of_sdist) == contents(wheel)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def is_left_over(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return "__pycache__" in parts or any(part == "out" or part.startswith("out-") for part in parts)


def test_wheel_has_the_command_and_the_licence(wheel: Path) -> None:
    folder, files = f"segue-{PROJECT['version']}.dist-info", contents(wheel)
    assert b"segue = segue.jobs.cli:main" in files[f"{folder}/entry_points.txt"]
    assert b"Apache License" in files[f"{folder}/licenses/LICENSE"]
    assert files[f"{folder}/top_level.txt"].split() == [b"segue"]


def test_version_is_the_same_in_project_changelog_and_installation() -> None:
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == PROJECT["version"] == version("segue")


def test_constraints_pin_every_direct_dependency_to_a_version_it_allows() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    wanted = [Requirement(text) for group in groups for text in group]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name != "segue":
            assert name in PINS, f"{name} has no pin in constraints.txt"
            assert requirement.specifier.contains(PINS[name]), f"{requirement} does not allow {PINS[name]}"


def test_constraints_name_torch_without_a_build_so_that_cpu_builds_count() -> None:
    assert re.fullmatch(r"[\d.]+", PINS["torch"])
    assert "segue" not in PINS


@pytest.mark.parametrize("name", ["torch", "transformers", "ray", "pyarrow", "pydantic"])
def test_constraints_are_what_these_tests_run_with(name: str) -> None:
    assert version(name).partition("+")[0] == PINS[name]


def test_set_up_files_name_no_host_and_no_absolute_path() -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        text = re.sub(r"^#!.*", "", (ROOT / name).read_text())
        text = text.replace("/dev/null", "")
        assert not re.search(r"https?://|file://|--index-url|--find-links", text), name
        assert not re.search(r"(^|[\s=\"'])/\w+/\w", text, re.MULTILINE), name
