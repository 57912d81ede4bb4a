"""Random schedules of rows, aborts and exceptions, any number of them: the test of three hundred, for an hour.

By hand: `make script RUN="tests/faults/schedules.py --count 20000"`. A seed names its schedule and its backend.
Ends with 1 at the first schedule that goes wrong, and prints it.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Iterator

from schedule_runs import SchedulesOver
from tiny_engines import BACKENDS

PROGRESS = 200  # schedules between two lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    started = time.monotonic()
    for number, seed in enumerate(_checked(range(given.first, given.first + given.count)), start=1):
        if number % PROGRESS == 0 or number == given.count:
            print(f"{number} of {given.count} schedules, the last with seed {seed}: {_seconds(started)}", flush=True)
    print(f"{given.count} schedules over {', '.join(BACKENDS)}: all as they must be, {_seconds(started)}")
    return 0


def _checked(seeds: range) -> Iterator[int]:
    """Seeds whose schedules went well, backend by backend. Exits at the first other one."""
    for backend in BACKENDS:
        with SchedulesOver(backend) as schedules:
            for seed in schedules.own(seeds):
                try:
                    schedules.check(seed)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    traceback.print_exc()
                    sys.exit(1)
                yield seed


def _seconds(started: float) -> str:
    cpu = time.process_time()
    return f"{time.monotonic() - started:.0f} s, {cpu:.0f} s of CPU"


if __name__ == "__main__":
    sys.exit(main())
