"""The arrows between packages: what imports what, held by import-linter, and seen to hold when the code runs.

Knows the rules in pyproject.toml and that they must bite; no behaviour of any package.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise, permutations, product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("attention", "workers", "pipeline", "jobs")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
FORBIDDEN_BELOW_PIPELINE = ("ray", "pyarrow", "s3fs", "fsspec")

BLOCKER = f"""
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in {FORBIDDEN_BELOW_PIPELINE!r}:
            raise ModuleNotFoundError(f"blocked: {{fullname}}", name=fullname)
        return None

sys.meta_path.insert(0, Blocker())
"""

TINY_MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from segue.attention import Segment
from segue.workers.models.echo import echo_tokenizer
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=256, **sizes))
engine = Engine(tree_model(model, echo_tokenizer()), EngineConfig(mask="segment"))
chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
prompts = [chat, "plain text", [Segment((1, 2, 3), True), Segment((4,), False)]]
outputs = engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 4, 4], outputs
assert engine.logits(prompts).shape == (3, 300)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_imports_of_the_repository_keep_every_contract() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", result.stdout)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("examples", "__pycache__"))
    shutil.copytree(ROOT / "segue", folder / "segue", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@contextmanager
def imports_added(copy: Path, added: Iterable[tuple[str, str]]) -> Iterator[None]:
    """(module or folder, module that it imports too) for the time of the block."""
    before: dict[Path, str] = {}
    for module, imported in added:
        path = copy / module / "__init__.py" if (copy / module).is_dir() else copy / f"{module}.py"
        before.setdefault(path, path.read_text())
        path.write_text(f"{path.read_text()}\nimport {imported}\n")
    try:
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


@pytest.mark.parametrize(
    ("module", "imported", "contract"),
    [
        ("attention", "segue.workers.rows.params", "arrows point down"),
        ("workers/engine", "segue.pipeline.storage.store", "arrows point down"),
        ("pipeline/run", "segue.jobs.show", "arrows point down"),
        ("attention/tree", "transformers", "attention is torch alone"),
        ("workers/engine", "ray", "workers know no Ray"),
        ("workers/rows", "pyarrow", "workers know no Ray"),
        ("pipeline/run", "transformers", "only workers import transformers"),
        ("jobs/commands", "ray", "only the pipeline imports Ray"),
        ("workers/rows", "workers", "Segue imports itself by its one name"),
        ("pipeline/jobfile", "pyarrow", "job files know no Arrow"),
        ("pipeline/jobfile", "segue.workers.models.load", "job files know no Arrow"),
        ("pipeline/storage", "ray", "storage and ledger know no Ray"),
        ("pipeline/ledger", "segue.pipeline.processes.ray_session", "storage and ledger know no Ray"),
        ("pipeline/ledger", "torch", "storage and ledger import no torch"),
        ("pipeline/prompts", "segue.pipeline.dataset.ray_source", "prompts know no Ray"),
        ("pipeline/dataset", "ray", "of a dataset only ray_source"),
        ("pipeline/plan/tree", "ray", "of a plan only order and windows"),
        ("pipeline/ready", "ray", "what makes a job ready imports no Ray"),
        ("jobs/analysis", "ray", "what shows and analyses outputs"),
        ("jobs/show", "transformers", "what shows and analyses outputs"),
    ],
)
def test_import_against_a_contract_breaks_it(copy: Path, module: str, imported: str, contract: str) -> None:
    with imports_added(copy, [(module, imported)]):
        result = lint_imports(copy)
    assert result.returncode == 1, result.stdout
    assert re.search(rf"^{contract}.* BROKEN", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_import_of_a_room_above_or_beside_breaks_the_contract_of_its_package(copy: Path, package: str) -> None:
    forbidden = list(forbidden_between_rooms(package))
    with imports_added(copy, [(lower.replace(".", "/"), f"segue.{upper}") for lower, upper in forbidden]):
        result = lint_imports(copy)
    refused = set(re.findall(r"^segue\.(\S+) is not allowed to import segue\.(\S+):$", result.stdout, re.MULTILINE))
    assert set(forbidden) - refused == set()


def forbidden_between_rooms(package: str) -> Iterator[tuple[str, str]]:
    """(room, a room that it must not import): each on the layer above, and those beside it where they are strangers."""
    (contract,) = [each for each in CONTRACTS if each.get("containers") == [f"segue.{package}"]]
    layers = [[f"{package}.{room.strip()}" for room in layer.split("|")] for layer in contract["layers"]]
    for upper, lower in pairwise(layers):
        yield from product(lower, upper)
    for layer in layers:
        yield from permutations(layer, 2)


@pytest.mark.parametrize("package", FORBIDDEN_BELOW_PIPELINE)
def test_blocker_makes_a_forbidden_import_fail(package: str) -> None:
    result = run_python(f"{BLOCKER}\nimport {package}")
    assert result.returncode == 1
    assert f"blocked: {package}" in result.stderr


def test_engine_generates_where_ray_and_storage_cannot_be_imported() -> None:
    result = run_python(BLOCKER + TINY_MODEL)
    assert result.returncode == 0, result.stderr


def test_every_module_below_the_pipeline_imports_without_ray_and_storage() -> None:
    names = [
        ".".join(("segue", *path.relative_to(ROOT).with_suffix("").parts))
        for p in PACKAGES[:2]
        for path in (ROOT / p).rglob("*.py")
    ]
    result = run_python(BLOCKER + "\n".join(f"import {name.removesuffix('.__init__')}" for name in names))
    assert result.returncode == 0, result.stderr


def test_attention_imports_torch_and_nothing_above_it() -> None:
    names = [
        ".".join(("segue", *path.relative_to(ROOT).with_suffix("").parts))
        for path in (ROOT / "attention").rglob("[a-z]*.py")
    ]
    result = run_python("import sys\n" + "\n".join(f"import {name}" for name in names) + "\nprint(*sys.modules)")
    assert result.returncode == 0, result.stderr
    seen = set(result.stdout.split())
    assert {"torch", "segue.attention.segments"} <= seen
    above = {"segue.workers", "segue.pipeline", "segue.jobs"}
    assert not seen & (above | {"transformers", "ray", "pyarrow", "pydantic", "s3fs"})


@pytest.mark.parametrize("policy", ["PASSIVE", "ACTIVE"])
@pytest.mark.parametrize("module", ["segue.workers.engine.engine", "segue.pipeline.run.worker"])
def test_threads_sleep_while_they_wait_for_each_other_unless_told(module: str, policy: str, monkeypatch) -> None:
    if policy == "ACTIVE":
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    else:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "TRUE")
    assert f"OMP_WAIT_POLICY = '{policy}'" in run_python(f"import {module}, torch").stderr


def test_telling_how_a_command_ended_needs_neither_torch_nor_ray() -> None:
    code = "import sys; from segue.jobs.commands.ending import exit_codes\nwith exit_codes(): pass"
    result = run_python(f"{code}\nprint([n for n in ('torch', 'ray', 'transformers') if n in sys.modules])")
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "segue.pipeline.jobfile.schema",
        "segue.pipeline.problems",
        "segue.jobs.cli",
        "segue.jobs.commands.running",
        "segue.jobs.commands.options",
    ],
)
def test_reading_a_job_file_and_asking_for_help_start_neither_torch_nor_ray(module: str) -> None:
    result = run_python(
        f"import sys, {module}; print([n for n in ('torch', 'ray', 'transformers') if n in sys.modules])"
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
