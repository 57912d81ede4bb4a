"""How the kernels are built and kept, and what becomes of a machine that cannot build them."""

import logging
import os
from pathlib import Path

import pytest
import torch

from segue.attention.cpu import building
from segue.attention.cpu.backend import KernelBackend
from segue.attention.cpu.building import load_kernels
from segue.attention.memory.budget import KVShape
from segue.workers.devices.devices import cpu_kernels, make_backend
from segue.workers.errors import ModelRefused

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing has been loaded yet. What is built is not optimised, which takes a fifth of the time."""
    monkeypatch.setattr(building, "FLAGS", [flag.replace("-O3", "-O0") for flag in building.FLAGS])
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def test_library_is_built_once_and_is_its_owners_alone(tmp_path, fresh, monkeypatch):
    if load_kernels(tmp_path / "kernels") is None:
        pytest.skip("no C++ compiler on this machine")
    (library,) = (tmp_path / "kernels").iterdir()  # no leftovers
    built = library.stat().st_mtime_ns
    assert (tmp_path / "kernels").stat().st_mode & 0o077 == 0
    load_kernels.cache_clear()
    assert load_kernels(tmp_path / "kernels") is not None
    assert library.stat().st_mtime_ns == built
    stranger = tmp_path / "stranger"  # written beside: the library is mapped into this process
    stranger.write_bytes(b"anything")
    os.chmod(stranger, 0o777)
    os.replace(stranger, library)
    load_kernels.cache_clear()
    assert load_kernels(tmp_path / "kernels") is not None
    assert library.stat().st_mtime_ns != built
    assert library.stat().st_mode & 0o022 == 0


def test_folder_that_others_may_write_to_is_not_used(tmp_path, fresh, caplog):
    if cpu_kernels() is None:
        pytest.skip("no C++ compiler on this machine")
    load_kernels.cache_clear()
    (tmp_path / "kernels").mkdir()
    os.chmod(tmp_path / "kernels", 0o777)
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "kernels") is None
    assert "others may write to" in caplog.text
    assert not list((tmp_path / "kernels").iterdir())


def test_torn_library_is_built_anew_by_the_next_process(tmp_path, fresh, caplog):
    if load_kernels(tmp_path / "other") is None:
        pytest.skip("no C++ compiler on this machine")
    (library,) = (tmp_path / "other").iterdir()
    (tmp_path / "kernels").mkdir(mode=0o700)
    (tmp_path / "kernels" / library.name).touch(mode=0o755)
    load_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "kernels") is None
    assert "cannot be used" in caplog.text
    load_kernels.cache_clear()
    assert load_kernels(tmp_path / "kernels") is not None


@pytest.mark.parametrize(
    ("compiler", "told"),
    [("/nowhere/g++", "nowhere"), ("false", "false"), ("broken", "an error of the compiler")],
)
def test_machine_without_a_working_compiler_uses_torchs_operations_and_says_so(
    tmp_path, fresh, monkeypatch, caplog, compiler, told
):
    if compiler == "broken":
        compiler = str(tmp_path / "compiler")
        script = '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho an error of the compiler >&2; exit 1\n'
        Path(compiler).write_text(script)
        os.chmod(compiler, 0o755)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("SEGUE_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cpu_kernels() is None
        assert cpu_kernels() is None
    assert len(caplog.records) == 1
    assert told in caplog.text
    assert _backend_names()["auto"] == "TorchBackend"
    with pytest.raises(ModelRefused, match=r"native wants a C\+\+ compiler"):
        make_backend("native", _shape(), [CPU])


def test_no_compiler_at_all(tmp_path, fresh, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path) is None
    assert "no C++ compiler found" in caplog.text


def test_library_that_lacks_a_function_is_not_used(tmp_path, fresh, monkeypatch, caplog):
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "other.cpp").write_text('extern "C" void segue_rms_norm() {}\n')
    monkeypatch.setattr("segue.attention.cpu.building.SOURCES", tmp_path / "cpp")
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "kernels") is None
    assert "segue_rotate" in caplog.text or "no C++ compiler" in caplog.text


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("SEGUE_CPU_KERNELS", "0")
    assert cpu_kernels() is None
    assert _backend_names()["auto"] == "TorchBackend"


def test_auto_is_the_kernels_where_they_can_be_had():
    if cpu_kernels() is None:
        pytest.skip("no C++ compiler on this machine")
    assert _backend_names() == {"auto": "KernelBackend", "cpu": "TorchBackend", "native": "KernelBackend"}
    assert isinstance(make_backend("auto", _shape(torch.bfloat16), [CPU]), KernelBackend)
    assert not isinstance(make_backend("auto", _shape(torch.float16), [CPU]), KernelBackend)


def _shape(dtype: torch.dtype = torch.float32) -> KVShape:
    return KVShape(1, 2, 8, dtype)


def _backend_names() -> dict[str, str]:
    names = ("auto", "cpu", "native") if cpu_kernels() is not None else ("auto", "cpu")
    return {name: type(make_backend(name, _shape(), [CPU])).__name__ for name in names}
