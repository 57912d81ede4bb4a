"""A training in several processes of Ray Train."""

import pytest
from finetune_jobs import curve, finetune, planned_again
from ray.train import WorkerGroupError

from segue.pipeline.problems import WorkersFailed
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.train import group
from segue.pipeline.train.finetune import prepare_finetune
from segue.workers.training.params import TrainingDiverged

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


@pytest.mark.chaos
@pytest.mark.usefixtures("local_ray")
def test_two_processes_train_like_one(trained, tmp_path):
    folder, alone = trained
    both = finetune(planned_again(trained[0], tmp_path), "workers.max_size=2")
    assert (both.status, both.steps) == ("done", alone.steps)
    for name in ("loss", "grad_norm"):
        seen = [[line[name] for line in curve(place / "ft") if name in line] for place in (folder, tmp_path)]
        assert seen[0] == pytest.approx(seen[1], abs=1e-3, rel=1e-2)
    assert both.eval_loss == pytest.approx(alone.eval_loss, abs=1e-3)


def test_failure_in_a_group_is_told_as_itself():
    """As Ray Train hands it over."""
    error = WorkerGroupError("1 of 2 failed", {1: TrainingDiverged("step 2: loss nan")})
    assert isinstance(group.cause_of_group(error), TrainingDiverged)
    other = group.cause_of_group(WorkerGroupError("1 of 2 failed", {0: KeyError("x")}))
    assert isinstance(other, WorkersFailed)
    assert "1 of 2 failed" in str(other)


@pytest.mark.usefixtures("local_ray")
def test_group_larger_than_the_cluster_is_refused_instead_of_waiting(trained, tmp_path):
    ready = prepare_finetune(planned_again(trained[0], tmp_path))
    with pytest.raises(WorkersFailed, match="max_size 3 with 1 threads each wants 3 CPUs, the cluster has 2"):
        group.train_group(ready.spec, 3, 1, str(tmp_path), Interrupt())
