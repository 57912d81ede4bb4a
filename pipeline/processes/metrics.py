"""Metrics of a run for Prometheus, through Ray: the driver reports what is committed, each worker its engine's state.

Nothing depends on them, and a process that dies loses only its own numbers. Ray exports a name as `ray_NAME`, and a
counter as `ray_NAME_total`. Knows Ray's metrics; nothing of units or rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from ray.util.metrics import Counter, Gauge

from segue.workers.engine.stats import EngineStats

TAG = "job_name"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. Each also has the tag `job_name`; the name `job` is taken by Prometheus."""

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...] = ()


ROWS = Metric("segue_rows", "counter", "rows committed by this run, those with an error included")
ERRORS = Metric("segue_row_errors", "counter", "rows committed with an error, by its code", ("code",))
TOKENS = Metric("segue_tokens", "counter", "tokens of committed rows: requested, computed or generated", ("kind",))
UNITS = Metric("segue_units", "counter", "units that came back: committed, lost, drained or failed", ("status",))
DONE_ROWS = Metric("segue_done_rows", "gauge", "rows committed in the whole output, by this run and those before it")
PLANNED_ROWS = Metric("segue_planned_rows", "gauge", "rows of the plan so far, in the whole output")
PLANNED_UNITS = Metric("segue_planned_units", "gauge", "units of the plan so far, in the whole output")
PLANNED_TOKENS = Metric("segue_planned_tokens", "gauge", "prompt tokens of the plan so far, as requested")
REUSE_SHARE = Metric("segue_reuse_share", "gauge", "of the committed rows' prompt tokens, the share not computed")

RUNNING = Metric("segue_engine_running_rows", "gauge", "samples that hold memory in an engine")
WAITING = Metric("segue_engine_waiting_rows", "gauge", "rows queued in an engine")
KV_BYTES = Metric("segue_engine_kv_bytes", "gauge", "memory for keys and values in use")
KV_CAPACITY = Metric("segue_engine_kv_capacity_bytes", "gauge", "memory for keys and values there is")
STEPS = Metric("segue_engine_steps", "counter", "steps of an engine")
STEP_SECONDS = Metric("segue_engine_step_seconds", "counter", "time spent in them")
ENGINE_TOKENS = Metric("segue_engine_tokens", "counter", "tokens in an engine: computed or generated", ("kind",))
PREEMPTIONS = Metric("segue_engine_preemptions", "counter", "samples that gave way for lack of memory")

OF_RUNS = (ROWS, ERRORS, TOKENS, UNITS, DONE_ROWS, PLANNED_ROWS, PLANNED_UNITS, PLANNED_TOKENS, REUSE_SHARE)
OF_ENGINES = (RUNNING, WAITING, KV_BYTES, KV_CAPACITY, STEPS, STEP_SECONDS, ENGINE_TOKENS, PREEMPTIONS)


def label_of(name: str, fingerprint: str) -> str:
    """A label that differs for jobs of the same name on one cluster: Ray keeps exporting the last numbers of each."""
    return f"{name}-{fingerprint[:8]}"


class _Exported:
    """Ray's objects for some metrics of one job."""

    def __init__(self, job: str, metrics: tuple[Metric, ...]) -> None:
        self._job = job
        self._counters = {
            each: Counter(each.name, each.description, (TAG, *each.tags)) for each in metrics if each.kind == "counter"
        }
        self._gauges = {each: Gauge(each.name, each.description, (TAG,)) for each in metrics if each.kind == "gauge"}

    def add(self, metric: Metric, amount: float, **tags: str) -> None:
        if amount > 0:  # Ray refuses 0
            self._counters[metric].inc(amount, {TAG: self._job, **tags})

    def set(self, metric: Metric, value: float) -> None:
        self._gauges[metric].set(value, {TAG: self._job})


class RunMetrics:
    """The driver's metrics: counts of this run, and the size of the plan."""

    def __init__(self, job: str) -> None:
        self._exported = _Exported(job, OF_RUNS)
        self._requested = self._computed = 0

    def planned(self, *, rows: int, units: int, tokens: int) -> None:
        self._exported.set(PLANNED_ROWS, rows)
        self._exported.set(PLANNED_UNITS, units)
        self._exported.set(PLANNED_TOKENS, tokens)

    def done(self, rows: int) -> None:
        self._exported.set(DONE_ROWS, rows)

    def unit(
        self, status: str, *, rows: int, errors: Mapping[str, int], requested: int, computed: int, generated: int
    ) -> None:
        """Count a unit that has come back. Rows and tokens count only if this attempt committed them."""
        self._exported.add(UNITS, 1, status=status)
        if status != "committed":
            return
        self._exported.add(ROWS, rows)
        for code, count in errors.items():
            self._exported.add(ERRORS, count, code=code)
        for kind, count in (("requested", requested), ("computed", computed), ("generated", generated)):
            self._exported.add(TOKENS, count, kind=kind)
        self._requested += requested
        self._computed += computed
        if self._requested:
            self._exported.set(REUSE_SHARE, 1 - self._computed / self._requested)


class EngineMetrics:
    """A worker's metrics: its engine's counters and state."""

    def __init__(self, job: str) -> None:
        self._exported = _Exported(job, OF_ENGINES)
        self._before: dict[str, float] = {}

    def __call__(self, stats: EngineStats) -> None:
        now = asdict(stats)
        grown = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._before = now
        self._exported.add(STEPS, grown["num_steps"])
        self._exported.add(STEP_SECONDS, grown["step_seconds"])
        self._exported.add(ENGINE_TOKENS, grown["num_computed_tokens"], kind="computed")
        self._exported.add(ENGINE_TOKENS, grown["num_generated_tokens"], kind="generated")
        self._exported.add(PREEMPTIONS, grown["num_preemptions"])
        self._exported.set(RUNNING, stats.num_running)
        self._exported.set(WAITING, stats.num_waiting)
        self._exported.set(KV_BYTES, stats.kv_bytes)
        self._exported.set(KV_CAPACITY, stats.kv_capacity_bytes)
