"""The arrows between packages: what imports what, held by import-linter, and seen to hold when the code runs.

Knows the rules in pyproject.toml and that they must bite; no behaviour of any package.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("attention", "workers", "pipeline", "jobs")
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


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("attention/tree/tree.py", "import segue.workers.rows.params", "arrows point down"),
        ("attention/tree/tree.py", "import transformers", "attention is torch alone"),
        ("workers/engine/engine.py", "import segue.pipeline.storage.store", "arrows point down"),
        ("workers/engine/engine.py", "import ray", "workers know no Ray"),
        ("workers/rows/params.py", "import pyarrow", "workers know no Ray"),
        ("pipeline/run/run.py", "import transformers", "only workers import transformers"),
        ("pipeline/run/run.py", "import segue.jobs.show.tables", "arrows point down"),
        ("jobs/show/tables.py", "import ray", "only the pipeline imports Ray"),
    ],
)
def test_import_against_the_arrows_breaks_its_contract(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("examples", "__pycache__"))
    shutil.copytree(ROOT / "segue", tmp_path / "segue", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout
    assert re.search(rf"{contract}.* BROKEN", result.stdout), result.stdout


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
    loaded = "sorted({name.partition('.')[0] for name in sys.modules})"
    result = run_python("import sys\n" + "\n".join(f"import {name}" for name in names) + f"\nprint({loaded})")
    assert result.returncode == 0, result.stderr
    seen = set(re.findall(r"'(\w+)'", result.stdout))
    assert "torch" in seen
    assert not seen & {"workers", "pipeline", "jobs", "transformers", "ray", "pyarrow", "pydantic", "s3fs"}


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
