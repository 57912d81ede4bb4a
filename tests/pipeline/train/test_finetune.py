"""A training in its folder: done once, resumed after stops and kills, refused beside another."""

import fcntl
import json
import shutil
import signal
from pathlib import Path

import pytest
from commands import segue
from echo_jobs import outcome, segue_process, wait_for
from finetune_jobs import curve, finetune, planned_again

from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.problems import JobRefused
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.store import OutputStorageError

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def test_finished_training_is_not_repeated_and_other_parameters_are_refused_by_name(trained):
    folder, summary = trained
    again = finetune(folder / "ft.yaml")
    assert again.status == "already_complete"
    assert (again.eval_loss, again.steps) == (summary.eval_loss, summary.steps)
    with pytest.raises(ForeignOutput, match=r"lora: there .*\"r\": 4.*here .*\"r\": 5"):
        finetune(folder / "ft.yaml", "lora.r=5")


@pytest.mark.chaos
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_killed_training_resumes_and_ends_with_the_same_curve(trained, tmp_path, signum):
    folder, whole = trained
    path = planned_again(trained[0], tmp_path)
    checkpoints = tmp_path / "ft" / "checkpoints"
    with segue_process(tmp_path, "finetune", "ft.yaml") as process:
        wait_for(lambda: list(checkpoints.glob("step-*")), process)
        process.send_signal(signum)
        code, stdout, stderr = outcome(process)
    assert code == (143 if signum == signal.SIGTERM else -9), stderr
    if signum == signal.SIGTERM:
        assert json.loads(stdout.splitlines()[-1])["status"] == "interrupted"
    done = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    assert 0 < done < whole.steps
    resumed = finetune(path)
    assert (resumed.status, resumed.steps, resumed.eval_loss) == ("done", whole.steps, whole.eval_loss)
    assert curve(tmp_path / "ft") == curve(folder / "ft")
    adapters = [place / "ft" / "adapter" / "adapter_model.safetensors" for place in (tmp_path, folder)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_training_that_is_refused_does_not_bind_its_folder(trained, tmp_path):
    _, whole = trained
    path = planned_again(trained[0], tmp_path)
    with pytest.raises(JobRefused, match="warmup_steps must be fewer"):
        finetune(path, "training.warmup_steps=100000")
    with pytest.raises(JobRefused, match="no linear layer 'nothing'"):
        finetune(path, "lora.target_modules=[nothing]")
    assert finetune(path, "training.max_num_batched_tokens=1000").steps == whole.steps


def test_second_training_in_a_folder_is_refused_while_the_first_is_at_work(trained, tmp_path):
    path = planned_again(trained[0], tmp_path)
    with (tmp_path / "ft" / "_job" / "training.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ForeignOutput, match="another training is at work"):
            finetune(path)


def test_adapter_that_is_gone_is_missed(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "all", copy_function=shutil.copy2)
    shutil.rmtree(tmp_path / "all" / "ft" / "adapter")
    with pytest.raises(OutputStorageError, match=r"adapter is gone although .*_SUCCESS"):
        finetune(tmp_path / "all" / "ft.yaml")


def test_finetune_command_ends_in_json_and_a_picture(trained):
    folder, _ = trained
    code, out, _ = segue("finetune", folder / "ft.yaml", "--quiet")
    assert code == 0
    last = json.loads(out.splitlines()[-1])
    assert last["status"] == "already_complete"
    assert Path(last["loss_curve"]).read_bytes().startswith(b"\x89PNG")
    assert Path(last["adapter"]).joinpath("segue.json").is_file()
    config = json.loads(Path(last["adapter"]).joinpath("adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    code, _, err = segue("evaluate", folder / "ft")
    assert code == 2
    assert "finetune" in err
    assert LocalStore(folder / "ft").exists("_SUCCESS")
