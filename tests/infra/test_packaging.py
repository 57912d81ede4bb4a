"""What is shipped: the wheel's content, one version everywhere, and set-up files that agree with each other.

Builds from a copy, without network. Knows no behaviour of the code.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("attention", "workers", "pipeline", "jobs")
SHIPPED = ("segue", *PACKAGES, "pyproject.toml", "README.md", "LICENSE")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS: dict[str, str] = {
    canonicalize_name(name): pinned
    for name, pinned in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel made from a copy of the checkout in which the examples and the tests have been run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "out", "out-*")
            )
        else:
            shutil.copy(source, folder)
    for left_over in ("out/part-000000.parquet", "out-bad/_job/manifest.json", "__pycache__/make_data.pyc"):
        path = folder / "jobs/examples/triage" / left_over
        path.parent.mkdir(parents=True)
        path.touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").iterdir()
    return zipfile.ZipFile(path)


def test_wheel_has_every_module_and_every_file_of_the_examples(wheel: zipfile.ZipFile) -> None:
    wanted = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if not is_left_over(path)}
    wanted |= {*(ROOT / "jobs/templates").iterdir(), *(ROOT / "attention/cpu/cpp").iterdir()}
    wanted |= {path for path in (ROOT / "jobs/examples").rglob("*") if path.is_file() and not is_left_over(path)}
    names = {f"segue/{path.relative_to(ROOT).as_posix()}" for path in wanted} | {"segue/__init__.py"}
    assert {"segue/jobs/examples/triage/job.yaml", "segue/jobs/examples/triage/data/tickets-0.parquet"} <= names
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == names


def is_left_over(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return "__pycache__" in parts or any(part == "out" or part.startswith("out-") for part in parts)


def test_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    folder = f"segue-{PROJECT['version']}.dist-info"
    assert "segue = segue.jobs.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert b"Apache License" in wheel.read(f"{folder}/licenses/LICENSE")
    assert set(wheel.read(f"{folder}/top_level.txt").decode().split()) == {"segue"}


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
