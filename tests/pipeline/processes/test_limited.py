"""A child process that works for its parent: its limits, its deaths, and what the parent learns of them."""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from segue.pipeline.processes import limited
from segue.pipeline.processes.limited import ChildDied, ChildUnready, LimitedProcess, clock_paused, tick

MIB = 2**20


def squares(count: int) -> Iterator[int]:
    for number in range(count):
        yield number * number


def my_pid() -> Iterator[int]:
    yield os.getpid()


def die_after_one(how: str) -> Iterator[str]:
    yield "one"
    if how == "abort":
        os.abort()
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(0)
    elif how == "loop":
        while True:
            pass
    elif how == "endless call":
        nine = int("9")  # a literal's power would keep the type checker as busy
        yield str(nine**nine**nine)  # lets no thread run
    elif how == "memory":
        yield str(len(bytearray(1024 * MIB)))
    elif how == "native memory":
        yield str(ctypes.CDLL(None).malloc(ctypes.c_size_t(1024 * MIB)))


def raise_error(error: Exception) -> Iterator[None]:
    yield None
    raise error


def sleeping_for(seconds: float) -> Iterator[str]:
    time.sleep(seconds)
    yield "done"


def busy_steps(number: int, seconds: float) -> Iterator[str]:
    for _ in range(number):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        tick()
    yield "done"


def paused_for(seconds: float) -> Iterator[str]:
    with clock_paused():
        time.sleep(seconds)
    yield "done"


def limits() -> Iterator[dict[str, int]]:
    import resource

    yield {"core": resource.getrlimit(resource.RLIMIT_CORE)[0], "data": resource.getrlimit(resource.RLIMIT_DATA)[0]}


def prints() -> Iterator[int]:
    print("a row's text")  # noqa: T201
    yield os.system("echo more; echo text >&2")


@pytest.fixture
def child():
    with LimitedProcess(seconds=1.5, memory_bytes=256 * MIB) as process:
        yield process


def pid_of(child: LimitedProcess) -> int:
    (pid,) = child.stream(my_pid)
    return pid


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.05)


def test_values_come_from_another_process_which_stays(child):
    assert list(child.stream(squares, 4)) == [0, 1, 4, 9]
    assert pid_of(child) == pid_of(child) != os.getpid()


@pytest.mark.parametrize(
    ("how", "death"),
    [("abort", "crash"), ("segfault", "crash"), ("exit", "crash"), ("loop", "time"), ("memory", "memory")],
)
def test_death_is_told_with_what_came_before_and_another_child_goes_on(child, how, death):
    before = pid_of(child)
    values = child.stream(die_after_one, how)
    assert next(values) == "one"
    with pytest.raises(ChildDied) as died:
        next(values)
    assert died.value.death == death
    assert not is_alive(before)
    assert list(child.stream(squares, 2)) == [0, 1]
    assert pid_of(child) != before


def test_memory_limit_holds_for_native_code_and_not_for_what_prepare_loads(child):
    assert list(child.stream(die_after_one, "native memory")) == ["one", "0"]  # no memory, no pointer
    big = LimitedProcess(seconds=10, memory_bytes=64 * MIB, prepare=load_much)
    with big:
        assert list(big.stream(squares, 2)) == [0, 1]


loaded: list[bytearray] = []


def load_much() -> None:
    loaded.append(bytearray(200 * MIB))


def fail_to_load() -> None:
    raise ValueError("no such tokenizer")


def test_what_prepare_raises_is_raised_by_each_call():
    with LimitedProcess(seconds=10, memory_bytes=64 * MIB, prepare=fail_to_load) as child:
        for _ in range(2):
            with pytest.raises(ValueError, match="no such tokenizer"):
                child.stream(squares, 2)


def die_while_loading() -> None:
    os._exit(1)


def load_too_much() -> None:
    loaded.append(bytearray(2048 * MIB))


@pytest.mark.parametrize(("prepare", "death"), [(die_while_loading, "crash"), (load_too_much, "memory")])
def test_child_that_cannot_be_made_ready_is_not_the_works_fault(prepare, death):
    with (
        LimitedProcess(seconds=10, memory_bytes=64 * MIB, prepare=prepare) as child,
        pytest.raises(ChildUnready, match=death),
    ):
        child.stream(squares, 2)


@pytest.mark.parametrize("error", [ValueError("what it says"), FileNotFoundError(2, "gone", "x.parquet")])
def test_exceptions_arrive_as_they_are_and_the_child_lives_on(child, error):
    before = pid_of(child)
    with pytest.raises(type(error)) as raised:
        list(child.stream(raise_error, error))
    assert str(raised.value) == str(error)
    assert pid_of(child) == before


class Unportable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raise_unportable() -> Iterator[None]:
    yield from ()
    raise Unportable("a", "b")


def test_exception_that_cannot_be_pickled_arrives_by_name(child):
    with pytest.raises(RuntimeError, match="Unportable: ab"):
        list(child.stream(raise_unportable))


def test_clock_counts_cpu_time_from_one_tick_to_the_next(child):
    assert list(child.stream(busy_steps, 3, 0.8)) == ["done"]
    assert list(child.stream(sleeping_for, 2.0)) == ["done"], "a machine may be busy"
    with pytest.raises(ChildDied, match="time"):
        list(child.stream(busy_steps, 1, 3.0))


def test_child_that_stands_still_is_ended_by_the_clock_unless_it_is_paused(child, monkeypatch):
    pid_of(child)  # starts it, which takes its time on a busy machine
    monkeypatch.setattr(limited, "IDLE_FACTOR", 2.0)  # 3 seconds by the clock
    assert list(child.stream(paused_for, 4.5)) == ["done"]
    with pytest.raises(ChildDied, match="time"):
        list(child.stream(sleeping_for, 600.0))


def test_stream_that_is_begun_beside_another_gets_none_of_its_values(child):
    first = child.stream(squares, 1000)
    next(first)
    second = child.stream(my_pid)
    assert next(second) != 1
    del first  # which must not end the second's child
    assert list(second) == []
    assert list(child.stream(squares, 3)) == [0, 1, 4]


def test_caller_that_stops_in_the_middle_does_not_get_old_values_later(child):
    values = child.stream(squares, 1000)
    next(values)
    values.close()
    assert list(child.stream(squares, 3)) == [0, 1, 4]


def test_child_writes_no_core_and_nothing_of_what_it_prints_is_kept(child, capfd):
    (found,) = child.stream(limits)
    assert found["core"] == 0
    assert 256 * MIB <= found["data"] < 1024 * MIB
    assert list(child.stream(prints)) == [0]
    assert capfd.readouterr() == ("", "")


def test_child_ends_when_it_is_idle_and_its_parent_does_not_mind(child, monkeypatch):
    monkeypatch.setattr(
        limited,
        "_SERVE",
        "from segue.pipeline.processes import limited; limited.IDLE_SECONDS = 0.2; limited.serve({descriptor})",
    )
    wait_until_gone(pid_of(child))
    assert list(child.stream(squares, 2)) == [0, 1]


PARENT = """
from test_limited import *
child = LimitedProcess(seconds=60, memory_bytes=256 * MIB)
pid = pid_of(child)
next(values := child.stream(die_after_one, sys.argv[1]))
print(pid, flush=True)
next(values)
"""


@pytest.mark.parametrize("how", ["loop", "endless call"])
def test_child_ends_with_its_parent_whatever_it_is_at(how):
    paths = os.pathsep.join([str(Path(__file__).parent), *(each for each in sys.path if each)])
    command = [sys.executable, "-c", PARENT, how]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())  # type: ignore[union-attr]
        assert is_alive(pid)
        parent.kill()
    wait_until_gone(pid)


def test_ticks_outside_a_child_do_nothing():
    tick()
    with clock_paused():
        pass


def have_memory(num_bytes: int) -> Iterator[int]:
    yield len(bytearray(num_bytes))


def prepare_to_say(word: str) -> None:
    os.environ["SAID"] = word


def said() -> Iterator[str]:
    yield os.environ.get("SAID", "")


def test_child_that_settles_for_other_work_goes_on_with_its_limits_and_preparation():
    with LimitedProcess(30.0, 1024 * MIB) as process:
        (pid,) = process.stream(my_pid)
        assert list(process.stream(have_memory, 512 * MIB)) == [512 * MIB]
        process.settle(30.0, 64 * MIB, partial(prepare_to_say, "once"))
        assert list(process.stream(my_pid)) == [pid]
        assert list(process.stream(said)) == ["once"]
        with pytest.raises(ChildDied) as died:
            list(process.stream(have_memory, 512 * MIB))
        assert died.value.death == "memory"
        assert list(process.stream(said)) == ["once"]  # by another, prepared alike


def test_child_that_is_busy_or_dead_is_replaced_when_it_settles():
    with LimitedProcess(30.0, 64 * MIB) as process:
        values = process.stream(squares, 3)
        next(values)
        process.settle(30.0, 64 * MIB, partial(prepare_to_say, "anew"))
        assert list(process.stream(said)) == ["anew"]
        with pytest.raises(ChildDied):
            list(process.stream(die_after_one, "exit"))
        process.settle(30.0, 64 * MIB, partial(prepare_to_say, "again"))
        assert list(process.stream(said)) == ["again"]
