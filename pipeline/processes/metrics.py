"""What Prometheus is told of a run, through Ray: what is committed, by the driver, and each engine's state, by its
worker.

Told, never asked: nothing depends on it, and a process that dies takes only its own numbers along. Ray puts `ray_`
before a name and `_total` behind a counter's. Knows Ray's metrics; nothing of units or rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from ray.util.metrics import Counter, Gauge

from segue.workers.engine.stats import EngineStats

TAG = "job_name"


@dataclass(frozen=True, slots=True)
class Metric:
    """One name, with what it counts or measures; each has the tag `job_name` besides: `job` is Prometheus' own."""

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


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
    """What tells a job from others of its name on the same cluster, whose last numbers Ray goes on to export."""
    return f"{name}-{fingerprint[:8]}"


class _Told:
    """Ray's objects for some metrics of one job."""

    def __init__(self, job: str, metrics: tuple[Metric, ...]) -> None:
        self._job = job
        self._counters = {
            each: Counter(each.name, each.description, (TAG, *each.tags)) for each in metrics if each.kind == "counter"
        }
        self._gauges = {each: Gauge(each.name, each.description, (TAG,)) for each in metrics if each.kind == "gauge"}

    def add(self, metric: Metric, amount: float, **tags: str) -> None:
        if amount > 0:  # Ray refuses to add nothing
            self._counters[metric].inc(amount, {TAG: self._job, **tags})

    def set(self, metric: Metric, value: float) -> None:
        self._gauges[metric].set(value, {TAG: self._job})


class RunMetrics:
    """Of the driver: counts of this run, and how large the plan is."""

    def __init__(self, job: str) -> None:
        self._told = _Told(job, OF_RUNS)
        self._requested = self._computed = 0

    def planned(self, *, rows: int, units: int, tokens: int) -> None:
        self._told.set(PLANNED_ROWS, rows)
        self._told.set(PLANNED_UNITS, units)
        self._told.set(PLANNED_TOKENS, tokens)

    def done(self, rows: int) -> None:
        self._told.set(DONE_ROWS, rows)

    def unit(
        self, status: str, *, rows: int, errors: Mapping[str, int], requested: int, computed: int, generated: int
    ) -> None:
        """A unit has come back; only what this attempt committed is counted."""
        self._told.add(UNITS, 1, status=status)
        if status != "committed":
            return
        self._told.add(ROWS, rows)
        for code, count in errors.items():
            self._told.add(ERRORS, count, code=code)
        for kind, count in (("requested", requested), ("computed", computed), ("generated", generated)):
            self._told.add(TOKENS, count, kind=kind)
        self._requested += requested
        self._computed += computed
        if self._requested:
            self._told.set(REUSE_SHARE, 1 - self._computed / self._requested)


class EngineMetrics:
    """Of a worker: its engine's counters, as they grow, and its state."""

    def __init__(self, job: str) -> None:
        self._told = _Told(job, OF_ENGINES)
        self._before: dict[str, float] = {}

    def __call__(self, stats: EngineStats) -> None:
        now = asdict(stats)
        grown = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._before = now
        self._told.add(STEPS, grown["num_steps"])
        self._told.add(STEP_SECONDS, grown["step_seconds"])
        self._told.add(ENGINE_TOKENS, grown["num_computed_tokens"], kind="computed")
        self._told.add(ENGINE_TOKENS, grown["num_generated_tokens"], kind="generated")
        self._told.add(PREEMPTIONS, grown["num_preemptions"])
        self._told.set(RUNNING, stats.num_running)
        self._told.set(WAITING, stats.num_waiting)
        self._told.set(KV_BYTES, stats.kv_bytes)
        self._told.set(KV_CAPACITY, stats.kv_capacity_bytes)
