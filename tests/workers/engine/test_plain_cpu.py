"""The engine's promises on a machine without a compiler: torch's operations do what the kernels do elsewhere."""

import pytest
import test_engine
import test_score
import torch
from tiny_models import tiny_tree_model

from segue.attention.cpu.by_torch import TorchBackend
from segue.workers.sampling.vocabulary import summarise

for _module in (test_engine, test_score):
    _tests = {name: each for name, each in vars(_module).items() if name.startswith("test_")}
    globals().update({f"{name}_without_kernels": each for name, each in _tests.items()})


@pytest.fixture(autouse=True, scope="module")
def _without_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGUE_CPU_KERNELS", "0")
        tiny_tree_model.cache_clear()  # a decoder keeps what it found when it was made
        yield
    tiny_tree_model.cache_clear()


def test_engine_here_has_no_kernels():
    assert isinstance(test_engine.engine().backend, TorchBackend)


def test_summary_is_that_of_all_rows():
    logits = torch.randn(40, 100).bfloat16()
    found = summarise(logits, with_totals=True)
    assert torch.equal(found.highest, logits.float().amax(-1))
    assert torch.equal(found.most_likely, logits.argmax(-1))
    torch.testing.assert_close(found.log_totals, logits.float().logsumexp(-1))
    assert not len(summarise(logits).log_totals)
