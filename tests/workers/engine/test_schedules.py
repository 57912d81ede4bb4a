"""Random schedules: whatever comes in whatever order, each row is answered once, as alone, and memory is given back.

Three hundred of them here. `tests/faults/schedules.py` runs any number.
"""

import pytest
from schedule_runs import SchedulesOver
from tiny_engines import BACKENDS

NUM_SCHEDULES = 300


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_schedules_answer_each_row_once_as_alone_and_give_memory_back(backend):
    with SchedulesOver(backend) as schedules:
        for seed in schedules.own(range(NUM_SCHEDULES)):
            schedules.check(seed)
