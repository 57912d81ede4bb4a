"""Properties of engines and models hold over every backend: a test that uses `each_backend` runs once over each."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", params=["kernels", "torch", "varlen"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The last is the GPU's, with an emulated kernel."""
    from tiny_engines import over_backend  # which imports torch and transformers

    with over_backend(request.param):
        yield request.param
