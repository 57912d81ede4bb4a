"""Work on other people's data in a child process with limits of time and memory. If it dies, its parent goes on.

A page may decode to gigabytes, a template may loop for ever, a text may crash the tokenizer. A process cannot stop any
of that from within. A child ends with its parent, and after a minute without work. It writes no core file, and its
output is discarded, since rows are private. Knows processes; nothing of rows.
"""

import ctypes
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Literal

import psutil

from segue.pipeline.processes.to_parent import TICK_SECONDS, ToParent

LOOK_SECONDS = 0.1
IDLE_FACTOR = 20  # a child may take this many times its CPU time by the clock
START_SECONDS = 300.0  # CPU time for imports, on a busy machine
PREPARE_BYTES = 2**30  # memory for imports and for all else that `prepare` loads
IDLE_SECONDS = 60.0  # a child without work ends after that
PR_SET_PDEATHSIG = 1  # of prctl(2)
_SERVE = "from segue.pipeline.processes.limited import serve; serve({descriptor})"

Death = Literal["crash", "time", "memory"]
_to_parent: ToParent | None = None  # in a child only


class ChildDied(Exception):
    """The child ended before its work was done: it crashed, or exceeded a limit."""

    def __init__(self, death: Death) -> None:
        super().__init__(death)
        self.death: Death = death


class ChildUnready(RuntimeError):
    """No child could be made ready for work, which is not the fault of any data."""


class LimitedProcess:
    """A child process that runs one generator function at a time. Close it at the end.

    `seconds`: CPU time that it may take from one `tick` or value to the next. `memory_bytes`: memory that it may take
    beyond what it holds when it starts to work. After ChildDied the next call starts another child.
    """

    def __init__(self, seconds: float, memory_bytes: int, prepare: Callable[[], object] | None = None) -> None:
        """`prepare` is called first in every child and loads what all calls need, within START_SECONDS and
        PREPARE_BYTES."""
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._prepare = prepare
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_ready = self._is_streaming = False
        self._end: Callable[[], object] = lambda: None

    def stream(
        self, function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float | None = None
    ) -> Iterator[Any]:
        """The values that the generator `function(*arguments)` yields in the child. Function, arguments and values are
        pickled. `seconds` replaces the child's own limit.

        Raises ChildDied, ChildUnready, and what `prepare` and `function` raise. A caller that stops in the middle, or
        begins another stream, ends the child, so that values of one stream are never taken for another's.
        """
        if self._is_streaming:
            self.close()
        child, connection = self._ready()
        return self._values(child, connection, seconds or self._seconds, (function, arguments))

    def begin(self) -> None:
        """Start a child that will be needed soon, unless there is one."""
        if self._child is not None and self._child.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = _start(theirs.fileno())
        except OSError as error:
            ours.close()
            raise ChildUnready(f"a child process could not be started: {error}") from error
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._child, self._connection)
        with suppress(OSError):  # it is gone; the first call reports that
            self._connection.send((os.getpid(), self._memory_bytes, self._prepare))

    def settle(self, seconds: float, memory_bytes: int, prepare: Callable[[], object]) -> None:
        """Take other work from now on. An idle child is kept for it, with the memory limit that a new one would have.

        Raises what `prepare` raises.
        """
        self._seconds, self._memory_bytes, self._prepare = seconds, memory_bytes, prepare
        if not self._is_ready or self._is_streaming or self._child is None or self._child.poll() is not None:
            self.close()
            return
        with suppress(ChildDied):  # the next call starts another
            list(self.stream(_settled, prepare, memory_bytes, seconds=START_SECONDS))

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self._end()
        self._child = self._connection = None
        self._is_ready = self._is_streaming = False

    def __enter__(self) -> "LimitedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> tuple["subprocess.Popen[bytes]", Connection]:
        """A prepared child."""
        self.begin()
        child, connection = self._child, self._connection
        if child is None or connection is None:
            raise ChildUnready("a child process was closed while it started")
        if not self._is_ready:
            try:
                list(self._values(child, connection, START_SECONDS))
            except ChildDied as died:
                raise ChildUnready(f"a child process could not be made ready: {died.death}") from None
            except Exception:
                self.close()
                raise
            self._is_ready = True
        return child, connection

    def _values(
        self, child: "subprocess.Popen[bytes]", connection: Connection, seconds: float, request: object = None
    ) -> Iterator[Any]:
        """The values of a request; without one, those of the request that was sent before."""
        is_idle = False
        clock = _Clock(child.pid, seconds)
        self._is_streaming = True
        try:
            if request is not None:
                connection.send(request)
            while True:
                kind, value = _next_message(connection, clock)
                if kind != "value":
                    break
                yield value
            is_idle = kind != "memory"
        except (EOFError, OSError):
            raise ChildDied("crash") from None
        finally:
            if self._child is child:  # and not that of a later stream
                self._is_streaming = False
                if not is_idle:
                    self.close()
        if kind == "memory":
            raise ChildDied("memory")
        if kind == "error":
            raise value


class _Clock:
    """What a process has used since its last sign of life. CPU time counts, since on a busy machine a process waits for
    its turn, and children of a Ray worker wait longest."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._process = psutil.Process(pid)
        self._seconds = seconds
        self.begin()

    def begin(self) -> None:
        self._started = time.monotonic()
        self._cpu_before: float | None = None

    def is_over(self) -> bool:
        try:
            used = self._cpu()
        except psutil.Error:  # it is gone; its connection reports that
            return False
        if self._cpu_before is None:
            self._cpu_before = used
        is_late = time.monotonic() - self._started > IDLE_FACTOR * self._seconds
        return is_late or used - self._cpu_before > self._seconds

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


def _next_message(connection: Connection, clock: _Clock) -> tuple[str, Any]:
    """The next message that is not a sign of life. Raises ChildDied if none comes in time."""
    clock.begin()
    is_paused = False
    while True:
        if not connection.poll(LOOK_SECONDS):
            if not is_paused and clock.is_over():
                raise ChildDied("time")
            continue
        kind, value = connection.recv()
        if kind not in ("tick", "pause"):
            return kind, value
        is_paused = kind == "pause"
        clock.begin()


def _end(child: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    child.kill()
    child.wait()


def _start(descriptor: int) -> "subprocess.Popen[bytes]":
    """Start a child that finds the parent's modules, whatever its working directory."""
    path = os.pathsep.join(each for each in sys.path if each)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _SERVE.format(descriptor=descriptor)],
        pass_fds=[descriptor],
        env=os.environ | {"PYTHONPATH": path, "ARROW_DEFAULT_MEMORY_POOL": "system"},  # other pools keep freed memory
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def tick() -> None:
    """Give a sign of life: the clock starts again. Does nothing outside a child."""
    if _to_parent is not None:
        _to_parent.tick()


@contextmanager
def clock_paused() -> Iterator[None]:
    """Stop the clock for work that has time limits of its own, such as requests to a store. Not to be nested."""
    if _to_parent is None:
        yield
        return
    _to_parent.begin_wait()
    try:
        yield
    finally:
        _to_parent.end_wait()


def serve(descriptor: int) -> None:
    """The child's main function: runs the calls of its parent one after the other."""
    global _to_parent
    connection = Connection(descriptor)
    _to_parent = ToParent(connection)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError, OSError):  # the parent is gone
        parent, memory_bytes, prepare = connection.recv()
        _ask_to_end_with_parent()
        threading.Thread(target=_watch, args=[parent, _to_parent], daemon=True).start()
        _limit_memory(PREPARE_BYTES + memory_bytes)
        _answer(_to_parent, _prepared, (prepare,))
        _limit_memory(memory_bytes)
        while connection.poll(IDLE_SECONDS):
            _answer(_to_parent, *connection.recv())


def _prepared(prepare: Callable[[], object] | None) -> Iterator[None]:
    if prepare is not None:
        prepare()
    yield from ()


def _settled(prepare: Callable[[], object], memory_bytes: int) -> Iterator[None]:
    prepare()
    _limit_memory(memory_bytes)
    yield from ()


def _answer(to_parent: ToParent, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    try:
        for value in function(*arguments):
            to_parent.send("value", value)
    except MemoryError:
        to_parent.send("memory")
    except BrokenPipeError:
        raise
    except Exception as error:
        to_parent.send("error", _portable(error))
    else:
        to_parent.send("done")


def _ask_to_end_with_parent() -> None:
    """Ask the kernel, which works while a computation in C blocks all threads. Linux only."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(parent: int, to_parent: ToParent) -> None:
    """From a thread: the parent, as it may have ended before the kernel was asked, and waits of the main thread."""
    with suppress(OSError):  # the parent is gone
        while os.getppid() == parent:
            time.sleep(TICK_SECONDS)
            to_parent.tell_long_wait()
    os._exit(1)


def _limit_memory(more: int) -> None:
    """Set RLIMIT_DATA, which counts private writable mappings; a limit of the address space would count files, too."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = _data_bytes() + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _data_bytes() -> int:
    """Memory that counts towards RLIMIT_DATA now; 0 if the system is not Linux."""
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0


def _portable(error: Exception) -> Exception:
    """The exception in a form that survives pickling: some cannot be pickled, and none keeps its traceback."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return copy if isinstance(copy, Exception) else RuntimeError(str(error))
