"""The rows of a window read, rendered, and in the plan's order: few in this process, more by Ray Data.

Starting Ray's tasks takes ten seconds, a few thousand rows take one. Either way a child process looks into the rows,
and the order is total, so the plan is the same.
"""

import signal
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray.data
import ray.exceptions

from segue.pipeline.dataset.blocks import InputChanged, InputUnreadable
from segue.pipeline.dataset.listing import is_local
from segue.pipeline.dataset.ray_source import RowSource
from segue.pipeline.plan.cutting import ORDER
from segue.pipeline.problems import WorkersFailed, first_and_last_line
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.interrupt import SIGNALS
from segue.pipeline.processes.limited import ChildUnready, LimitedProcess
from segue.pipeline.prompts.render import RenderSpec
from segue.pipeline.prompts.rows import PlannedRowReader, RowLimits
from segue.pipeline.ready.checks import CheckedJob

STREAM_ROWS = 4096
FEW_ROWS = 8192
FEW_BYTES = 8 * 2**20  # decompressed, as footers say, which may lie:
FEW_PIECES = 4096  # of files, which are read one after the other: 2 ms each, and of a bucket REMOTE_PIECE times as long
REMOTE_PIECE = 64
HELD_BYTES = 128 * 2**20  # rows that turn out to be larger go to Ray, which keeps on disk what does not fit


def sorted_rows(
    job: CheckedJob, spec: RenderSpec, window: int, child: LimitedProcess | None = None
) -> Generator[pa.Table]:
    """A window of the input. Rows that are few are prepared in `child`, if there is one.

    Raises InputChanged, InputUnreadable, WorkersFailed, ChildUnready, and if Ray is needed and cannot be had,
    ClusterUnavailable.
    """
    reader = _reader(job, spec)
    source = RowSource(job.inputs, reader, job.window(window))
    table = _sorted_here(source, reader, child) if _are_few(source) else None
    if table is not None:
        yield from (table.slice(start, STREAM_ROWS) for start in range(0, len(table), STREAM_ROWS))
    else:
        yield from _sorted_by_ray(source)


def needs_ray(job: CheckedJob, spec: RenderSpec) -> bool:
    """Whether a plan of the whole input needs Ray, as far as its footers say."""
    reader = _reader(job, spec)
    return not all(_are_few(RowSource(job.inputs, reader, job.window(each))) for each in range(job.num_windows))


def _reader(job: CheckedJob, spec: RenderSpec) -> PlannedRowReader:
    limits = job.config.limits
    return PlannedRowReader(job.columns.read, spec, RowLimits(limits.row_cpu_s, limits.row_memory_bytes))


def _are_few(source: RowSource) -> bool:
    is_small = source.num_rows <= FEW_ROWS and source.estimate_inmemory_data_size() <= FEW_BYTES
    return is_small and sum(1 if is_local(file.path) else REMOTE_PIECE for file, *_ in source.pieces) <= FEW_PIECES


def _sorted_here(source: RowSource, reader: PlannedRowReader, child: LimitedProcess | None) -> pa.Table | None:
    """None if there is more of it than footers say."""
    blocks, size = [reader.empty()], 0
    try:
        if child is not None:
            reader.settle(child)
        for file, piece, wanted in source.pieces:
            for block in reader.read(file, piece.start, piece.stop, wanted, child):
                blocks.append(block)
                size += block.nbytes
                if size > HELD_BYTES:
                    return None
    except (InputChanged, InputUnreadable, ChildUnready):
        raise
    except Exception as error:  # a task of Ray's would have failed with it
        raise WorkersFailed(first_and_last_line(f"{type(error).__name__}: {error}")) from error
    return pa.concat_tables(blocks).sort_by([(name, "ascending") for name in ORDER])


def _sorted_by_ray(source: RowSource) -> Iterator[pa.Table]:
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    with ray_session.ray_session():
        _set_again(handlers)
        rows = ray.data.read_datasource(source)
        ray_session.wait_for_ever(rows)
        try:
            yield from rows.sort(ORDER).iter_batches(batch_size=STREAM_ROWS, batch_format="pyarrow", prefetch_batches=1)
            return
        except ray.exceptions.RayError as error:
            failure = ray_session.cause_of(error, InputChanged, InputUnreadable)
    raise failure  # without Ray's traceback, which would hold its executor and workers


def _set_again(handlers: Mapping[signal.Signals, Any]) -> None:
    """Ray takes SIGTERM for itself when it starts, which may be in the middle of a plan."""
    if threading.current_thread() is threading.main_thread():
        for signum, handler in handlers.items():
            if handler is not None:  # else it is not Python's
                signal.signal(signum, handler)
