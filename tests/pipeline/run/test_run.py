"""Whole runs on a real Ray: every row exactly once, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from echo_jobs import (
    NUM_ROWS,
    ROWS_PER_FILE,
    answers,
    awkward_table,
    origins,
    rows_of,
    segue_process,
    shards_in,
    wait_for,
    write_input,
    write_job,
)
from ready_jobs import ready_job
from tiny_models import tiny_model, tiny_tokenizer

from segue.pipeline.dataset.blocks import InputChanged
from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput
from segue.pipeline.ledger.totals import RunSummary
from segue.pipeline.problems import ClusterUnavailable, WorkersFailed
from segue.pipeline.processes import ray_session
from segue.pipeline.run.run import plan_job, run_job
from segue.pipeline.storage.store import OutputStorageError

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")
PACKAGES = ("attention", "workers", "pipeline", "jobs")
SLOW = {"model": {"source": "echo:0.4"}, "workers": {"units_in_flight": 1}}


def run(job: Path, *overrides: str, say=lambda line: None) -> RunSummary:
    return run_job(ready_job(job, overrides), say, quiet=True)


@pytest.fixture(scope="module")
def done(local_ray, tmp_path_factory) -> Path:
    """A folder with a finished run; tests leave it as it is."""
    folder = write_input(tmp_path_factory.mktemp("done"))
    assert run(write_job(folder)).status == "done"
    return folder


def test_run_every_input_row_is_in_the_output_exactly_once(done):
    assert set(rows_of(done / "out")) == origins()
    sizes = [pq.read_metadata(path).num_rows for path in shards_in(done / "out")]
    assert sizes == [ROWS_PER_FILE, ROWS_PER_FILE, ROWS_PER_FILE, NUM_ROWS - 3 * ROWS_PER_FILE]


def test_run_input_columns_come_out_bit_equal_with_their_types(done):
    table = pa.concat_tables([pq.read_table(path) for path in shards_in(done / "out")]).sort_by("id")
    wanted = pa.concat_tables([pq.read_table(path) for path in sorted((done / "in").iterdir())])
    assert wanted.num_rows == NUM_ROWS
    for field in wanted.schema:
        assert table.schema.field(field.name).type == field.type, field.name
        assert repr(table[field.name].to_pylist()) == repr(wanted[field.name].to_pylist()), field.name


def test_run_result_columns_are_the_documented_ones(done):
    table = pq.read_table(shards_in(done / "out")[0])
    own = [name for name in table.column_names if name not in awkward_table(0, 1).column_names]
    assert set(own) == set(RESULT_COLUMNS["generate"]) - {"logprobs", "samples"}
    assert set(table["finish_reason"].to_pylist()) == {"length"}
    assert set(table["num_generated_tokens"].to_pylist()) == {6}
    for row in table.to_pylist():
        assert f"{row['prompt']}\nassistant\n".endswith(row["generated_text"])


def test_run_success_file_lists_every_shard_with_its_size(done):
    record = json.loads((done / "out" / SUCCESS).read_text())
    assert record["rows"] == NUM_ROWS
    listed = {(shard["name"], shard["bytes"]) for shard in record["shards"]}
    assert listed == {(path.name, path.stat().st_size) for path in shards_in(done / "out")}


def test_run_again_does_nothing_and_says_so_without_ray(done, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: pytest.fail("Ray was looked for"))
    before = {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*")}
    summary = run(done / "job.yaml")
    assert (summary.status, summary.exit_code, summary.rows, summary.rows_this_run) == ("already_complete", 0, 60, 0)
    assert {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*")} == before


def test_run_with_another_mask_in_the_same_folder_is_refused_by_name(done):
    with pytest.raises(ForeignOutput, match='mask: there "causal", here "segment"'):
        run(done / "job.yaml", "mask=segment")


def test_run_limit_gives_the_same_answers_as_the_same_rows_of_the_full_run(done):
    summary = run(done / "job.yaml", "input.limit=37", "output.path=limited")
    assert summary.rows == 37
    limited, full = answers(done / "limited"), answers(done / "out")
    assert set(limited) == {("a.parquet", n) for n in range(30)} | {("b.parquet", n) for n in range(7)}
    assert limited == {key: full[key] for key in limited}


def test_run_shard_gone_after_success_is_told_and_not_passed_over(local_ray, tmp_path):
    job = write_job(write_input(tmp_path))
    run(job)
    lost = shards_in(tmp_path / "out")[1]
    lost.unlink()
    with pytest.raises(OutputStorageError, match=lost.name):
        run(job)
    (tmp_path / "out" / SUCCESS).unlink()
    assert run(job).rows_this_run == ROWS_PER_FILE
    assert set(rows_of(tmp_path / "out")) == origins()


@pytest.mark.parametrize("foreign", ["other.parquet", "data/other.parquet"])
def test_run_into_a_folder_with_foreign_files_is_refused(tmp_path, foreign):
    job = write_job(write_input(tmp_path))
    (tmp_path / "out" / foreign).parent.mkdir(parents=True)
    (tmp_path / "out" / foreign).write_text("theirs")
    with pytest.raises(ForeignOutput, match=foreign.split("/")[0]):
        run(job)


def test_run_foreign_file_beside_our_shards_is_refused(done, tmp_path):
    foreign = done / "out" / "part-000000-0.parquet"
    foreign.write_text("theirs")
    success = (done / "out" / SUCCESS).rename(tmp_path / SUCCESS)
    try:
        with pytest.raises(ForeignOutput, match=foreign.name):
            run(done / "job.yaml")
    finally:
        foreign.unlink()
        success.rename(done / "out" / SUCCESS)


def test_run_bad_rows_cost_themselves_in_one_schema(local_ray, tmp_path):
    prompts = ["fine", None, "", " \n", "x" * 300, "raise", "also fine", b"\xff\xfe", "last"]
    texts = [p.encode() if isinstance(p, str) else p for p in prompts]
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": pa.array(texts, pa.binary()).view(pa.string()), "n": range(len(texts))})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    template = (
        "{% for m in messages %}{% if m.content == 'raise' %}{{ raise_exception('no') }}{% endif %}"
        "<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    )
    output = {"path": "out", "max_rows_per_file": 3}
    job = write_job(tmp_path, prompt={"chat_template": template}, output=output, limits={"max_model_len": 200})
    summary = run(job)
    codes = [None, "NULL_PROMPT", "EMPTY_PROMPT", "EMPTY_PROMPT", "PROMPT_TOO_LONG", "TEMPLATE_ERROR", None]
    codes += ["BAD_UTF8", None]
    tables = [pq.read_table(path) for path in shards_in(tmp_path / "out")]
    assert len({str(table.schema.remove_metadata()) for table in tables}) == 1
    assert any(table["error"].null_count == 0 for table in tables), "no shard of errors only"
    rows = pa.concat_tables(tables).drop_columns("prompt").sort_by("n").to_pylist()
    assert [row["error"] and row["error"]["code"] for row in rows] == codes
    assert all((row["generated_text"] is None) == (row["error"] is not None) for row in rows)
    wanted = {"BAD_UTF8": 1, "EMPTY_PROMPT": 2, "NULL_PROMPT": 1, "PROMPT_TOO_LONG": 1, "TEMPLATE_ERROR": 1}
    assert (summary.errors, summary.num_errors, summary.exit_code) == (wanted, 6, 0)


def test_run_row_parameters_that_are_not_passed_through_still_count(local_ray, tmp_path):
    (tmp_path / "in").mkdir()
    own = ['{"max_tokens": 2}', '{"n": 3, "logprobs": 1}', None, '{"max_tokens": -1}']
    pq.write_table(pa.table({"prompt": ["abcdefgh"] * 4, "sampling_params": own}), tmp_path / "in" / "a.parquet")
    prompt, output = {"format": "text", "text": "{prompt}"}, {"path": "out", "columns": []}
    run(write_job(tmp_path, prompt=prompt, output=output))
    rows = [row for _, row in sorted(rows_of(tmp_path / "out").items())]
    assert [row["generated_text"] for row in rows] == ["gh", "cdefgh", "cdefgh", None]
    assert [len(row["samples"] or []) for row in rows] == [1, 3, 1, 0]
    assert [len(row["logprobs"] or []) for row in rows] == [0, 6, 0, 0]
    assert rows[3]["error"]["code"] == "BAD_PARAMS"
    assert "sampling_params" not in rows[0]


def test_run_many_samples_with_logprobs_have_their_columns(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), sampling_params={"max_tokens": 4, "n": 2, "logprobs": 1})
    run(job)
    for row in rows_of(tmp_path / "out").values():
        first, second = row["samples"]
        assert first["generated_text"] == second["generated_text"] == row["generated_text"]
        assert len(row["logprobs"]) == len(second["logprobs"]) == 4
        assert [top["token_id"] for top in row["logprobs"][0]["top"]] == [row["logprobs"][0]["token_id"]]


def test_run_without_rows_is_complete_without_a_shard(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), input={"path": "in", "limit": 0})
    assert (run(job).status, run(job).status) == ("done", "already_complete")
    assert shards_in(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / SUCCESS).read_text())["rows"] == 0


def test_run_more_workers_than_fit_still_ends(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), workers={"min_size": 3, "max_size": 3, "threads": 64})
    assert run(job).status == "done"


def test_run_unit_may_take_longer_than_ray_waits_for_progress(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1
    )  # half an hour by default
    job = write_job(write_input(tmp_path), model={"source": "echo:4"}, input={"path": "in", "limit": 5})
    assert run(job).status == "done"


def test_run_unit_that_was_tampered_with_ends_in_one_clear_error(local_ray, tmp_path):
    job = write_job(write_input(tmp_path))
    manifest = plan_job(ready_job(job), lambda line: None)
    unit = tmp_path / "out" / manifest.units[2].unit_name
    content = unit.read_bytes()
    unit.write_bytes(content[:100] + b"?" + content[101:])
    with pytest.raises(OutputStorageError, match=unit.name) as failed:
        run(job)
    assert len(str(failed.value).splitlines()) == 1
    assert not (tmp_path / "out" / SUCCESS).exists()
    unit.write_bytes(content)
    assert run(job).status == "done"
    assert set(rows_of(tmp_path / "out")) == origins()


def test_run_input_that_changes_after_the_check_is_one_clear_error(local_ray, tmp_path):
    ready = ready_job(write_job(write_input(tmp_path)))
    os.utime(tmp_path / "in" / "b.parquet", ns=(1, 1))
    with pytest.raises(InputChanged, match=r"b\.parquet") as failed:
        run_job(ready, lambda line: None, quiet=True)
    assert len(str(failed.value).splitlines()) == 1


def test_run_corrupt_input_page_costs_its_rows(local_ray, tmp_path):
    folder = write_input(tmp_path)
    path = folder / "in" / "b.parquet"
    pq.write_table(awkward_table(30, 60), path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = path.read_bytes()
    place = content.index(b"number 45")
    path.write_bytes(content[:place] + b"N" + content[place + 1 :])
    summary = run(write_job(folder), "limits.max_error_rate=1")
    assert (summary.status, summary.errors) == ("done", {"INPUT_CORRUPT": 30})
    rows = rows_of(folder / "out")
    assert set(rows) == origins()
    assert {key[0] for key, row in rows.items() if row["error"]} == {"b.parquet"}


def test_run_over_the_error_limit_stops_with_3_until_the_limit_is_raised(local_ray, tmp_path):
    (tmp_path / "in").mkdir()
    prompts = [None if n % 4 == 0 else f"p{n}" for n in range(1200)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    job = write_job(tmp_path, output={"path": "out", "max_rows_per_file": 600})
    for _ in range(2):
        summary = run(job)
        assert (summary.status, summary.exit_code) == ("too_many_errors", 3)
    assert run(job, "limits.max_error_rate=0.3").exit_code == 0
    assert len(rows_of(tmp_path / "out")) == 1200


@pytest.mark.chaos
def test_run_signal_while_planning_exits_143_and_the_next_run_plans_anew(local_ray, tmp_path):
    job = write_job(write_input(tmp_path))
    with pytest.raises(SystemExit) as exited:
        run(job, say=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert exited.value.code == 143
    assert not (tmp_path / "out" / "_job" / "manifest.json").exists()
    stale = tmp_path / "out" / "_job" / "units" / "unit-000000-0000000000000000.parquet"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text("of a plan that was never finished")
    assert run(job).status == "done"
    assert set(rows_of(tmp_path / "out")) == origins()


@pytest.mark.chaos
def test_run_signal_between_units_drains_and_a_rerun_finishes(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), **SLOW, output={"path": "out", "max_rows_per_file": 5})

    def terminate():
        wait_for(lambda: shards_in(tmp_path / "out"))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    lines: list[str] = []
    summary = run(job, say=lines.append)
    assert (summary.status, summary.exit_code) == ("interrupted", 143)
    assert 0 < summary.rows < NUM_ROWS
    assert any("interrupt again" in line for line in lines)
    assert signal.getsignal(signal.SIGTERM) is not None
    rest = run(job, "model.source=echo")
    assert (rest.status, rest.rows_this_run) == ("done", NUM_ROWS - summary.rows)
    assert set(rows_of(tmp_path / "out")) == origins()


@pytest.mark.chaos
def test_run_worker_killed_in_the_middle_costs_nothing(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), **SLOW, output={"path": "out", "max_rows_per_file": 5})

    def kill_worker():
        wait_for(lambda: shards_in(tmp_path / "out"))
        for pid in _pids_of("MapWorker(MapBatches(UnitWorker))"):
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_worker, daemon=True)
    killer.start()
    assert run(job).status == "done"
    killer.join()
    assert set(rows_of(tmp_path / "out")) == origins()


def _pids_of(title: str) -> list[int]:
    """Processes of this test's own Ray with this title."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if title.encode() in (entry / "cmdline").read_bytes() and _has_ancestor(int(entry.name), os.getpid()):
                found.append(int(entry.name))
    assert found, f"no process has the title {title}"
    return found


def _has_ancestor(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


@pytest.mark.chaos
def test_run_driver_killed_half_way_from_a_folder_that_shadows_ours_and_rerun_has_every_row_once(local_ray, tmp_path):
    folder = write_input(tmp_path)
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the wrong package was imported')")
    job = write_job(folder, **SLOW, output={"path": "out", "max_rows_per_file": 5})
    with segue_process(folder, "run", job.name, "--quiet") as process:
        wait_for(lambda: len(shards_in(folder / "out")) >= 2, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(shards_in(folder / "out")) < 12
        summary = run(job, "model.source=echo")
        assert summary.status == "done"
    assert set(rows_of(folder / "out")) == origins()
    assert not list((folder / "out").rglob(".tmp-*"))


def test_ray_local_session_has_a_private_token_and_refuses_who_lacks_it(local_ray):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    address = ray.get_runtime_context().gcs_address
    script = f"import ray; print(len(ray._raylet.GcsClient(address={address!r}).get_all_node_info(timeout=10)))"
    with_token = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert with_token.stdout.strip() == "1", with_token.stderr
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    for intruder in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=without | intruder
        )
        assert refused.returncode != 0, refused.stdout
        assert "auth" in refused.stderr.lower()


@pytest.mark.parametrize(("failures", "starts"), [(1, 2), (5, ray_session.LOCAL_STARTS)])
def test_local_ray_that_a_busy_machine_starts_too_slowly_is_started_again(monkeypatch, failures, starts):
    tried, begun = [], []

    def init(**_):
        tried.append(1)
        if len(tried) <= failures:
            begun.append(subprocess.Popen(["sleep", "60"]))  # a node that comes too late
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with nullcontext() if failures < ray_session.LOCAL_STARTS else pytest.raises(ClusterUnavailable, match="timed out"):
        ray_session._start(2)
    assert len(tried) == starts
    assert [process.wait(1) for process in begun[: starts - 1]] == [-signal.SIGKILL] * (starts - 1)
    for process in begun[starts - 1 :]:
        process.kill()
        process.wait()


def test_joining_a_ray_without_a_token_is_warned_of_and_refused_where_it_is_required(monkeypatch, capsys):
    check = ray_session._check_authentication
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check("192.0.2.1:6379")
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RAY_AUTH_MODE")
    check("192.0.2.1:6379")
    assert "warning: joining Ray at 192.0.2.1:6379 without token" in capsys.readouterr().err
    monkeypatch.setenv(ray_session.REQUIRE_AUTH, "1")
    with pytest.raises(ClusterUnavailable, match="without a token, and SEGUE_REQUIRE_AUTH=1"):
        check("192.0.2.1:6379")


def test_run_workers_whose_model_is_gone_fail_with_the_cause(local_ray, tmp_path, monkeypatch):
    folder = write_input(tmp_path)
    model = folder / "model"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    monkeypatch.setenv("SEGUE_CACHE", str(folder / "cache"))
    job = write_job(folder, model={"source": str(model)})
    ready = ready_job(job)
    plan_job(ready, lambda line: None)
    (model / "model.safetensors").unlink()
    with pytest.raises(WorkersFailed, match="safetensors") as failed:
        run_job(ready, lambda line: None, quiet=True)
    assert len(str(failed.value).splitlines()) == 1
