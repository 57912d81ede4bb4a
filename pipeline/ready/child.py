"""The child process in which a job's model and prompts are looked at, before anything of theirs is trusted.

A command has one, from the check of its job to the plan of its first rows: starting another takes longer than a check.
Knows processes and job files; nothing of rows.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.processes.limited import PREPARE_BYTES, ChildDied, LimitedProcess
from segue.pipeline.prompts.check import import_all
from segue.workers.models.echo import is_echo
from segue.workers.prompts.encoder import import_tokenizers

CHECK_SECONDS = 120.0  # for loading a configuration or tokenizer, and for rendering a message with it

Found = TypeVar("Found")


def checking_child() -> LimitedProcess:
    """A child for `ready_job` and the plan after it. It starts when a job file has been read. To be closed."""
    return LimitedProcess(CHECK_SECONDS, PREPARE_BYTES)


def begin_check(child: LimitedProcess, config: JobConfig) -> None:
    """Start the child for this job. It imports what the check needs: for a model torch and transformers, which takes
    seconds."""
    prepare = import_tokenizers if is_echo(config.model.source) else import_all
    child.settle(CHECK_SECONDS, PREPARE_BYTES + config.limits.row_memory_bytes, prepare)
    child.begin()


def found_in_child(child: LimitedProcess, look: Callable[..., Iterator[Found]], *arguments: Any) -> Found:
    """The one value that `look(*arguments)` yields there. Tried twice: something else may have ended the process.

    Raises ChildDied, ChildUnready, and what `look` raises.
    """
    with suppress(ChildDied):
        (found,) = child.stream(look, *arguments)
        return found
    (found,) = child.stream(look, *arguments)
    return found
