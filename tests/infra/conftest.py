"""What is shipped, built without network from a copy of the checkout."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("segue", "attention", "workers", "pipeline", "jobs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, with the files that running the examples leaves behind."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "out", "out-*")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    for left_over in ("out/part-000000.parquet", "out-bad/_job/manifest.json", "__pycache__/make_data.pyc"):
        path = folder / "jobs/examples/triage" / left_over
        path.parent.mkdir(parents=True)
        path.touch()
    return folder


@pytest.fixture(scope="session")
def wheel(checkout: Path) -> Path:
    return built_wheel(checkout)


@pytest.fixture(scope="session")
def wheel_of_sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the source distribution alone."""
    unpacked = tmp_path_factory.mktemp("sdist")
    run(checkout, sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('sdist')")
    (path,) = (checkout / "sdist").iterdir()
    with tarfile.open(path) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return built_wheel(folder)


def built_wheel(folder: Path) -> Path:
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(folder, *build, "--wheel-dir", "dist", ".")
    (path,) = (folder / "dist").iterdir()
    return path


def run(folder: Path, *command: str | Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
