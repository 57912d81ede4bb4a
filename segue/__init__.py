"""Segue: offline inference over datasets, with each shared prompt segment computed once.

The public face of the library. The names below are loaded when they are first used, so that `import segue` takes no
time: the engine needs torch.

The four packages of Segue (`segue.attention`, `segue.workers`, `segue.pipeline`, `segue.jobs`) lie at the top of the
repository. Here are links to them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segue.attention.segments import Segment
    from segue.workers.engine.engine import Engine
    from segue.workers.rows.params import SamplingParams

__all__ = ["Engine", "SamplingParams", "Segment"]

_MODULES = {
    "Engine": "segue.workers.engine.engine",
    "SamplingParams": "segue.workers.rows.params",
    "Segment": "segue.attention.segments",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'segue' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
