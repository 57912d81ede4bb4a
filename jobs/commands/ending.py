"""How a command ends and what it says: expected failures as a line and an exit code, results as a line of JSON.

stdout is for results, stderr for people.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

REFUSED, WORKERS, STORAGE = 2, 4, 5
EXIT_CODES = {
    0: ("done; row errors within `limits.max_error_rate` included", "`segue report OUT`, `segue errors OUT`"),
    2: ("refused before anything started", "each line names a key, what it got and what it wanted; then again"),
    3: ("units are missing, or too many rows have errors", "`segue errors OUT`, `segue status OUT`, the same command"),
    4: ("workers cannot work, or the cluster cannot be reached", "the last lines name why; the same command goes on"),
    5: ("input cannot be read, or output not written", "free space or access; the same command goes on from there"),
    130: ("interrupted, units in flight finished", "the same command goes on"),
    143: ("terminated, or a submitted job was cancelled", "the same command goes on"),
}


@contextmanager
def exit_codes() -> Iterator[None]:
    """Expected failures as one line each and their exit code; a bug keeps its traceback."""
    from segue.pipeline.dataset.blocks import InputChanged, InputUnreadable
    from segue.pipeline.ledger.manifest import ForeignOutput
    from segue.pipeline.ledger.shards import ForeignShard
    from segue.pipeline.problems import ClusterUnavailable, JobRefused, WorkersFailed
    from segue.pipeline.processes.limited import ChildUnready
    from segue.pipeline.storage.store import OutputStorageError
    from segue.workers.errors import ModelRefused
    from segue.workers.training.params import TrainingDiverged

    try:
        yield
    except (JobRefused, ForeignOutput, ForeignShard, InputChanged, ModelRefused) as error:
        _fail(error, REFUSED)
    except (WorkersFailed, ClusterUnavailable, ChildUnready, TrainingDiverged) as error:
        _fail(error, WORKERS)
    except (OutputStorageError, InputUnreadable) as error:
        _fail(error, STORAGE)


def _fail(error: Exception, code: int) -> None:
    say(str(error))
    raise typer.Exit(code) from None


def say(line: str) -> None:
    """To a person. What libraries put into the messages of their errors is not ours to choose."""
    from segue.pipeline.problems import redact

    print(redact(line), file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number of things: 1 file, 2 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


silent: Callable[[str], None] = lambda line: None  # noqa: E731


def print_json(value: object) -> None:
    print(json.dumps(value, default=str), flush=True)
