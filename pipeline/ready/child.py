"""The child process in which a job's model and prompts are looked at, before anything of theirs is trusted.

Kept for who checks several jobs, since starting one takes longer than a check, as long as the environment says the same
of where files and models are, and of who asks.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.processes.limited import PREPARE_BYTES, ChildDied, LimitedProcess
from segue.pipeline.prompts.check import import_all
from segue.workers.models.echo import is_echo
from segue.workers.prompts.encoder import import_tokenizers

CHECK_SECONDS = 120.0  # for loading a configuration or tokenizer, and for rendering a message with it
PLACES = ("AWS_", "FSSPEC_", "HF_", "SEGUE_")  # beginnings of names in the environment

Found = TypeVar("Found")


def checking_process(config: JobConfig) -> LimitedProcess:
    """The one that there is, or a new one. `begin` it early: for a model it imports torch and transformers."""
    names = sorted(name for name in os.environ if name.startswith(PLACES))
    environment = tuple((name, os.environ[name]) for name in names)
    return _process_for(config.limits.row_memory_bytes, environment, not is_echo(config.model.source))


def found_in_child(config: JobConfig, look: Callable[..., Iterator[Found]], *arguments: Any) -> Found:
    """The one value that `look(*arguments)` yields there. Tried twice: something else may have ended the process.

    Raises ChildDied, ChildUnready, what `look` does.
    """
    child = checking_process(config)
    with suppress(ChildDied):
        (found,) = child.stream(look, *arguments)
        return found
    (found,) = child.stream(look, *arguments)
    return found


def handed_over(config: JobConfig) -> LimitedProcess:
    """The checking process, which the next check will not find any more."""
    child = checking_process(config)
    _process_for.cache_clear()
    return child


@functools.lru_cache(maxsize=1)
def _process_for(memory_bytes: int, _: tuple[tuple[str, str], ...], has_model: bool) -> LimitedProcess:
    prepare = import_all if has_model else import_tokenizers
    return LimitedProcess(CHECK_SECONDS, PREPARE_BYTES + memory_bytes, prepare)
