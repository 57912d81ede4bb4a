"""The search for rows that end their worker, without processes: who is convicted, and who never is."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ray
import ray.exceptions
from hypothesis import given
from hypothesis import strategies as st

from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.ledger.verdicts import Verdicts
from segue.pipeline.processes.reservation import Reservation
from segue.pipeline.run.quarantine import Outcome, Quarantine
from segue.pipeline.run.receipt import Receipt
from segue.pipeline.storage.folder import LocalStore
from segue.workers.errors import RowError, RowErrorCode

CRASH = RowError(RowErrorCode.WORKER_CRASH, "twice")


class KeptStore(LocalStore):
    """Overwritten files, in memory."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.files: dict[str, bytes] = {}

    def overwrite(self, name: str, content: bytes) -> None:
        self.files[name] = content

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def discard(self, name: str) -> None:
        self.files.pop(name, None)


class Simulated(Quarantine):
    """Workers die of the rows in `poison`, of any two of `together`, and at the calls in `accidents`."""

    def __init__(self, poison: set[int], together: set[int], accidents: set[int]) -> None:
        nothing: Any = None
        self.store = KeptStore()
        verdicts = Verdicts(self.store, "here")
        super().__init__(nothing, nothing, nothing, Reservation(1), lambda unit, count: True, verdicts)
        self.poison, self.together, self.accidents = poison, together, accidents
        self.deaths_alone: dict[int, int] = {}
        self.num_calls = self.num_deaths = 0

    def convicted(self, num_rows: int) -> set[int]:
        found: dict[int, RowError] = {}
        assert self._search(UnitSpec(0, "unit", num_rows, num_rows, 1), range(num_rows), found)
        return set(found)

    def _try(self, unit: UnitSpec, places: Sequence[int]) -> Outcome:
        self.num_calls += 1
        dies = self.poison & set(places) or len(self.together & set(places)) > 1 or self.num_calls in self.accidents
        self.num_deaths += bool(dies)
        if dies and len(places) == 1:
            self.deaths_alone[places[0]] = self.deaths_alone.get(places[0], 0) + 1
        return CRASH if dies else "survived"


ROWS = st.integers(1, 40)


@given(st.data(), ROWS)
def test_exactly_the_rows_that_die_alone_are_convicted_and_each_died_alone_twice(data, num_rows):
    rows = st.sets(st.integers(0, num_rows - 1))
    quarantine = Simulated(data.draw(rows), data.draw(rows), set())
    assert quarantine.convicted(num_rows) == quarantine.poison
    # A unit of one row comes here because it died alone already.
    assert num_rows == 1 or all(quarantine.deaths_alone[place] == 2 for place in quarantine.poison)


@given(st.data(), ROWS)
def test_accidents_convict_nobody_unless_they_hit_one_row_alone_twice(data, num_rows):
    quarantine = Simulated(set(), set(), data.draw(st.sets(st.integers(1, 60), max_size=8)))
    twice = {place for place in quarantine.convicted(num_rows) if quarantine.deaths_alone[place] < 2}
    assert num_rows == 1 or not twice


def test_one_culprit_among_many_rows_is_found_in_few_processes():
    quarantine = Simulated({5000}, set(), set())
    assert quarantine.convicted(8192) == {5000}
    assert quarantine.num_calls < 30


def test_half_that_is_to_blame_since_the_other_survived_is_not_run_to_see_it_die():
    quarantine = Simulated({8191}, set(), set())
    assert quarantine.convicted(8192) == {8191}
    assert quarantine.num_deaths == 2, "only of the row that had to die alone"


def test_verdicts_are_kept_while_a_unit_is_searched_and_hold_where_they_were_found():
    quarantine = Simulated({3, 5}, set(), set())
    quarantine.convicted(8)
    unit = UnitSpec(0, "unit", 8, 8, 1)
    assert Verdicts(quarantine.store, "here").load(unit).keys() == {3, 5}
    assert Verdicts(quarantine.store, "elsewhere").load(unit) == {}
    assert Verdicts(quarantine.store, "here").load(UnitSpec(0, "other", 8, 8, 1)) == {}
    (name,) = quarantine.store.files
    for damaged in (b"", b"[]", b"{}", b'{"circumstances": "here", "rows": {"a": ["WORKER_CRASH", ""]}}'):
        quarantine.store.files[name] = damaged
        assert Verdicts(quarantine.store, "here").load(unit) == {}


def test_unit_whose_rows_an_earlier_run_convicted_is_committed_without_a_search(monkeypatch):
    """And one in which more rows are bad is searched for these alone."""
    unit = UnitSpec(0, "unit", 8, 8, 1)
    for poison in ({3}, {3, 5}):
        quarantine = Simulated(poison, set(), set())
        Verdicts(quarantine.store, "here").save(unit, {3: CRASH})
        asked: list[set[int]] = []

        def receipt(convicted, poison=poison, asked=asked):
            asked.append(set(convicted))
            if poison - set(convicted):
                raise ray.exceptions.ActorDiedError()
            return Receipt(0, "committed", 8)

        worker = SimpleNamespace(receipt=SimpleNamespace(remote=lambda unit, convicted: dict(convicted)))
        monkeypatch.setattr(quarantine, "_living", lambda worker=worker: worker)
        monkeypatch.setattr(quarantine, "_cause_of_death", lambda: CRASH)
        monkeypatch.setattr(ray, "get", receipt)
        assert quarantine.settle(unit) == Receipt(0, "committed", 8)
        assert asked == ([{3}] if poison == {3} else [{3}, {3, 5}])
        assert (quarantine.num_calls == 0) == (poison == {3})
        assert not quarantine.store.files, "the shard has them now"
