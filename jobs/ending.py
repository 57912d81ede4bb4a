"""How a command ends and what it says: expected failures as a line and an exit code, results as a line of JSON.

stdout is for results, stderr for people.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

REFUSED, WORKERS, STORAGE = 2, 4, 5


@contextmanager
def exit_codes() -> Iterator[None]:
    """Expected failures as one line each and their exit code; a bug keeps its traceback."""
    from pipeline.cluster import ClusterUnavailable, WorkersFailed
    from pipeline.limited import ChildUnready
    from pipeline.manifest import ForeignOutput
    from pipeline.problems import JobRefused
    from pipeline.rows import InputChanged, InputUnreadable
    from pipeline.shards import ForeignShard
    from pipeline.store import OutputStorageError
    from workers.model_source import ModelRefused
    from workers.train import TrainingDiverged

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
    from pipeline.problems import redact

    print(redact(line), file=sys.stderr, flush=True)


silent: Callable[[str], None] = lambda line: None  # noqa: E731


def print_json(value: object) -> None:
    print(json.dumps(value, default=str), flush=True)
