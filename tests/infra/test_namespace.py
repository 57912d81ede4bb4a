"""Segue is one name: its packages live beside a user's own `jobs`, `workers`, `pipeline` and `attention`.

Each environment is new and has a Segue of its own. What Segue needs is taken from the environment of the tests, without
the Segue that is installed there.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from echo_jobs import NUM_ROWS, rows_of, write_input, write_job

# Modules that a user may have. Segue has modules of the same names.
USER_MODULES = ("jobs/cli.py", "workers/engine.py", "pipeline/run.py", "attention/tree.py")
IMPORT_BOTH = """
import json, pkgutil, sys
from jobs.cli import OWNER as a
from workers.engine import OWNER as b
from pipeline.run import OWNER as c
from attention.tree import OWNER as d

import segue

for module in pkgutil.walk_packages(segue.__path__, "segue."):
    __import__(module.name)
files = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "segue"}
print(json.dumps({"owners": [a, b, c, d], "prefix": sys.prefix, "files": files}))
"""
RAY_DRIVER = """
import json
import ray

@ray.remote
def files():
    import segue.workers
    import workers.engine

    return workers.engine.__file__, segue.workers.__file__

ray.init(address="local", num_cpus=1, include_dashboard=False)
print(json.dumps(ray.get(files.remote())))
"""


def environment(folder: Path, *installed: str | Path) -> Path:
    """The Python of a new environment in which this is installed."""
    answer((sys.executable, "-m", "venv", "--without-pip", folder), folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python does not read .pth files of a folder that a .pth file names, so the tests' own Segue stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    answer((*pip, "--no-deps", "--no-build-isolation", *installed), folder)
    return python


def answer(command: tuple[str | Path, ...], folder: Path, **variables: str) -> str:
    """stdout of a command that is started in `folder` and knows of no other Segue and of no cluster."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_"))}
    done = subprocess.run(
        command, cwd=folder, env=plain | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of a user."""
    for name in USER_MODULES:
        module = tmp_path / name
        module.parent.mkdir()
        (module.parent / "__init__.py").touch()
        module.write_text("OWNER = 'user'\n")
    return tmp_path


@pytest.mark.parametrize("started", ["as a script", "with PYTHONPATH=."])
def test_namespace_every_module_of_ours_and_the_users_own_are_imported(python, project, started):
    if started == "as a script":
        (project / "script.py").write_text(IMPORT_BOTH)
        found = json.loads(answer((python, project / "script.py"), python.parent))
    else:
        found = json.loads(answer((python, "-c", IMPORT_BOTH), project, PYTHONPATH="."))
    assert found["owners"] == ["user"] * 4
    assert Path(found["prefix"]) == python.parents[1]
    assert {"segue.attention.segments", "segue.workers.engine.engine", "segue.pipeline.run.run"} <= found[
        "files"
    ].keys()
    assert [path for path in found["files"].values() if not path.startswith(found["prefix"])] == []


@pytest.mark.slow
def test_namespace_tasks_of_a_ray_driver_import_ours_and_the_users_own(python, project):
    (project / "driver.py").write_text(RAY_DRIVER)
    theirs, ours = json.loads(answer((python, "driver.py"), project, PYTHONPATH=".").splitlines()[-1])
    assert Path(theirs) == project / "workers" / "engine.py"
    assert Path(ours).is_relative_to(python.parents[1])


@pytest.mark.slow
def test_namespace_job_runs_beside_the_users_own(python, project):
    job = write_job(write_input(project))
    told = answer((python.with_name("segue"), "run", job), project, PYTHONPATH=".")
    assert json.loads(told.splitlines()[-1])["rows"] == NUM_ROWS == len(rows_of(project / "out"))


def test_namespace_edited_and_new_files_of_an_editable_installation_count_at_once(checkout, tmp_path):
    copy = shutil.copytree(checkout, tmp_path / "checkout", symlinks=True)
    python = environment(tmp_path / "environment", "--editable", copy)
    (copy / "workers/__init__.py").write_text("EDITED = 'edited'\n")
    (copy / "workers/added.py").write_text("from segue.workers import EDITED\n")
    code = "from segue.workers.added import EDITED; print(EDITED)"
    assert answer((python, "-c", code), tmp_path) == "edited\n"


def test_namespace_python_m_segue_is_the_command(python, tmp_path):
    assert answer((python, "-m", "segue", "schema"), tmp_path) == answer(
        (python.with_name("segue"), "schema"), tmp_path
    )


def test_public_face_has_three_names_and_loads_them_when_they_are_used():
    code = (
        "import sys, segue; print(dir(segue)); print({'torch', 'ray', 'transformers'} & {*sys.modules})\n"
        "from segue import *; print(Engine.__name__, SamplingParams.__name__, Segment.__name__)"
    )
    names, loaded, used = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert names == "['Engine', 'SamplingParams', 'Segment']"
    assert loaded == "set()"
    assert used == "Engine SamplingParams Segment"


def test_public_face_refuses_another_name_and_says_what_there_is():
    import segue

    with pytest.raises(AttributeError, match="no attribute 'LLM'; it has Engine, SamplingParams, Segment"):
        _ = segue.LLM
