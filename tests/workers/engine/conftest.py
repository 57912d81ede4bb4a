"""The engine's properties hold over every backend: a test that uses `each_backend` runs once over each."""

from collections.abc import Iterator

import pytest
from tiny_engines import BACKENDS, over_backend


@pytest.fixture(scope="module", params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with over_backend(request.param):
        yield request.param
