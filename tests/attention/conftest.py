"""The compiled kernels, on one thread and on three."""

from collections.abc import Iterator

import pytest
import torch

from segue.attention.cpu.kernels import Kernels
from segue.workers.devices.devices import cpu_kernels


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    found = cpu_kernels()
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield found
    torch.set_num_threads(before)


@pytest.fixture
def tiles(kernels: Kernels) -> Kernels:
    if not kernels.multiplies():
        pytest.skip("this processor multiplies no tiles")
    return kernels
