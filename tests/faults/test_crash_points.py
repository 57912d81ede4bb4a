"""A death at every kind of step of the commit protocol, and at two of them: what is resumed ends exact."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from crash_points import (
    HALF_WRITTEN,
    MAX_TOKENS,
    BucketPlace,
    FullDisk,
    LocalPlace,
    Place,
    bucket,
    crash,
    pairs_of,
    run_job,
    steps_of,
)
from oracle import check_exact, check_visible_are_whole, echo_answer

from segue.pipeline.storage.store import OutputStorageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def die_everywhere(place: Place, wanted: Sequence[str]) -> None:
    """Once at the last step of each name, since names repeat from shard to shard; then at pairs of steps."""
    names = steps_of(place)
    assert set(wanted) <= set(names)
    for name, number in {name: number for number, name in enumerate(names, 1)}.items():
        assert crash(place, number), name
    for pair in pairs_of(len(names), 4, seed=0):
        assert crash(place, *pair)


@pytest.mark.chaos
def test_death_at_any_step_on_local_disk_ends_exact(tmp_path: Path) -> None:
    steps = [
        HALF_WRITTEN,
        "after fsync of temporary file",
        "before link of part-000001.parquet",
    ]
    die_everywhere(
        LocalPlace(tmp_path), [*steps, "after link of _SUCCESS", "after fsync of out", "before leftovers are removed"]
    )


@pytest.mark.long
def test_death_at_any_step_on_s3_ends_exact(tmp_path: Path) -> None:
    steps = [f"{when} pipe_file of {name}" for when in ("before", "after") for name in ("manifest.json", "_SUCCESS")]
    with bucket():
        die_everywhere(BucketPlace(tmp_path), [*steps, "after pipe_file of part-000002.parquet", "before ls of out"])


@pytest.mark.chaos
def test_disk_that_fills_up_ends_the_run_with_the_reason_and_costs_nothing(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    writes = [number for number, name in enumerate(steps_of(place), 1) if name == HALF_WRITTEN]
    for number in writes:
        place.clear()
        with place.crashing(FullDisk(number)), pytest.raises(OutputStorageError, match="No space left on device"):
            run_job(place)
        check_visible_are_whole(place.fs, place.output)
        assert not list(Path(place.output).rglob(".tmp-*")), "what could not be written takes room"
        assert run_job(place) == "done"
        check_exact(place.fs, place.inputs, place.output, answer=lambda row: echo_answer(row["prompt"], MAX_TOKENS))
