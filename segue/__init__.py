"""Segue: offline inference over datasets, with each shared prompt segment computed once.

This is the public face of the library. A name is loaded when it is first used, because the engine needs torch and
`import segue` should take no time.

The four packages (`segue.attention`, `segue.workers`, `segue.pipeline`, `segue.jobs`) lie at the top of the repository;
`segue/` has links to them.
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
