"""The command as a person meets it: what it prints, where, and how it exits."""

import json
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import finished_output, segue
from echo_jobs import NUM_ROWS, origins, outcome, rows_of, segue_process, shards_in, wait_for, write_input, write_job
from ready_jobs import ready_job

from segue.jobs.show.folder import show_summary
from segue.pipeline.ledger.totals import RunSummary


def test_cli_validate_good_job_says_so_and_ends_in_json(tmp_path):
    code, out, err = segue("validate", write_job(write_input(tmp_path)))
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {
        "valid": True,
        "rows": NUM_ROWS,
        "mask": "causal",
        "dtype": "float32",
        "planned": False,
        "sample": {"rows": NUM_ROWS, "errors": 0},
    }
    assert "valid" in err
    assert "warning" not in err
    assert not (tmp_path / "out").exists()


def test_cli_validate_refuses_all_problems_at_once_one_line_each(tmp_path):
    write_input(tmp_path)
    prompt = {"messages": [{"role": "user", "content": "{promt}"}]}
    job = write_job(tmp_path, mask="none", sampling_params={"temperature": -1, "max_tokns": 3}, prompt=prompt)
    code, out, err = segue("validate", job)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    for key in ("mask", "sampling_params.temperature", "sampling_params.max_tokns", "promt"):
        assert sum(key in line for line in lines) >= 1, (key, err)
    assert len(lines) >= 4
    assert "Traceback" not in err


def test_cli_validate_tells_of_rows_that_have_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["a", None, "b"]}), tmp_path / "in" / "a.parquet")
    code, out, err = segue("validate", write_job(tmp_path))
    assert code == 0
    assert json.loads(out)["sample"] == {"rows": 3, "errors": 1}
    assert "warning: 1 of 3 rows that were tried have an error:\n  NULL_PROMPT in row 1 of a.parquet: " in err


def test_cli_validate_refuses_a_cluster_that_does_not_answer_beside_other_problems(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, _, err = segue("validate", write_job(write_input(tmp_path), mask="none"))
    assert code == 2
    assert "environment: RAY_ADDRESS: got 127.0.0.1:1, where nothing answers" in err
    assert "mask" in err


def test_cli_run_on_a_cluster_that_does_not_answer_exits_4_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, _, err = segue("run", write_job(write_input(tmp_path)))
    assert code == 4
    assert "environment: RAY_ADDRESS: got 127.0.0.1:1, where nothing answers" in err


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")
def test_cli_model_that_does_not_fit_is_refused_where_it_would_run(tmp_path, monkeypatch, model_directory):
    """Planning needs no weights, and a cluster has memory of its own."""
    from segue.pipeline.ready import model as checking

    model = {"source": model_directory, "dtype": "float32"}
    path = write_job(write_input(tmp_path), model=model, workers={"min_size": 2, "max_size": 2})
    weight_bytes = ready_job(path, runs_here=True).facts.weight_bytes
    weights = sum(file.stat().st_size for file in Path(model_directory).glob("*.safetensors"))
    assert 0.5 * weights < weight_bytes <= weights, "a file is its weights and a header"
    monkeypatch.setattr(checking, "free_memory_bytes", lambda: 2 * weight_bytes)
    assert segue("validate", path)[0] == 0
    monkeypatch.setattr(checking, "free_memory_bytes", lambda: 2 * weight_bytes - 1)
    for command in ("validate", "run"):
        code, _, err = segue(command, path)
        assert code == 2
        assert "model: got weights of 0.0 GiB in float32, for each of 2 workers, wanted what fits into" in err
    ready_job(path)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert segue("validate", path)[0] == 0


@pytest.mark.parametrize("command", ["run", "plan"])
def test_cli_require_auth_joins_no_cluster_without_a_token(tmp_path, monkeypatch, command):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("SEGUE_REQUIRE_AUTH", "0")  # monkeypatch takes back what the option sets
    monkeypatch.setattr("segue.pipeline.plan.order.FEW_ROWS", 0)  # the plan of a few needs no cluster
    code, _, err = segue(command, write_job(write_input(tmp_path)), "--require-auth")
    assert code == 4
    assert "without a token, and SEGUE_REQUIRE_AUTH=1" in err


@pytest.mark.parametrize("command", ["validate", "run", "plan"])
def test_cli_job_file_that_is_not_there_exits_2(tmp_path, command):
    code, out, err = segue(command, tmp_path / "none.yaml")
    assert (code, out) == (2, "")
    assert "none.yaml" in err
    assert len(err.splitlines()) == 1


def test_cli_run_into_a_folder_with_foreign_files_exits_2_in_one_line(tmp_path):
    job = write_job(write_input(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs.csv").touch()
    for command in ("run", "plan", "validate"):
        code, out, err = segue(command, job)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "theirs.csv" in err


def test_cli_sampling_params_column_of_another_type_is_refused_by_name(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["x"], "sampling_params": [1]}), tmp_path / "in" / "a.parquet")
    code, _, err = segue("validate", write_job(tmp_path, output={"path": "out", "columns": []}))
    assert code == 2
    assert err.startswith(str(tmp_path)) or "sampling_params" in err
    assert "int64" in err
    assert "prompt:" not in err


def test_cli_set_overrides_and_limit_take_part_in_the_check(tmp_path):
    job = write_job(write_input(tmp_path))
    assert segue("validate", job, "--set", "sampling_params.max_tokens=0")[0] == 2
    assert segue("validate", job, "--limit", "-1")[0] == 2
    assert segue("validate", job, "--limit", "5")[0] == 0


def test_cli_schema_is_the_json_schema_of_a_job():
    code, out, _ = segue("schema")
    schema = json.loads(out)
    assert code == 0
    assert {"model", "input", "output", "prompt", "sampling_params"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_cli_errors_lists_rows_and_counts_them(tmp_path):
    error = {"code": "NULL_PROMPT", "message": "the prompt is null"}
    output = finished_output(tmp_path, [b"x", None, None, b"y"], [None, error, error | {"code": "BAD_UTF8"}, None])
    code, out, _ = segue("errors", output, "--limit", "1")
    *lines, last = out.splitlines()
    assert code == 0
    assert json.loads(last)["errors"] == {"BAD_UTF8": 1, "NULL_PROMPT": 1}
    assert lines == ["a:1 NULL_PROMPT: the prompt is null", "... and 1 more"]


def test_cli_errors_of_a_folder_that_is_not_ours_exits_2(tmp_path):
    code, out, err = segue("errors", tmp_path)
    assert (code, out) == (2, "")
    assert "manifest" in err


def test_cli_errors_of_a_damaged_shard_exits_5_in_one_line(tmp_path):
    output = finished_output(tmp_path, [b"x"], [None])
    shards_in(output)[0].write_bytes(b"damaged")
    code, _, err = segue("errors", output)
    assert (code, len(err.splitlines())) == (5, 1)


def test_cli_show_answers_escapes_what_rows_hold(tmp_path, capsys):
    from segue.jobs.show.rows import show_answers

    output = finished_output(tmp_path, [b"\xff bytes", b"\x1b[31m[bold]red"], [None, None])
    show_answers(str(output), 5)
    shown = capsys.readouterr().out
    assert "answer 0" in shown
    assert "answer 1" in shown
    assert "\ufffd bytes" in shown
    assert "\x1b[31m" not in shown
    assert "[bold]red" in shown


@pytest.mark.chaos
def test_cli_run_end_to_end_drains_on_sigterm_and_a_second_command_finishes(tmp_path):
    folder = write_input(tmp_path)
    output = {"path": "out", "max_rows_per_file": 5}
    job = write_job(folder, model={"source": "echo:0.5"}, workers={"units_in_flight": 1}, output=output)
    with segue_process(folder, "run", job.name) as process:
        wait_for(lambda: shards_in(folder / "out"), process)
        process.send_signal(signal.SIGTERM)
        code, out, err = outcome(process)
    assert code == 143, err
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted"
    assert "Traceback" not in err
    assert "Deprecat" not in err
    with segue_process(folder, "run", job.name, "--set", "model.source=echo", "--json", "--quiet") as process:
        code, out, err = outcome(process)
    assert code == 0, err
    (line,) = out.splitlines()
    assert json.loads(line)["rows"] == NUM_ROWS
    assert set(rows_of(folder / "out")) == origins()


@pytest.mark.parametrize(
    ("status", "num_errors", "said"),
    [
        ("done", 0, None),
        (
            "done",
            2,
            "next: segue errors '/a b'; segue retry '/a b' --output OTHER --set KEY=VALUE answers these rows again",
        ),
        ("interrupted", 0, "next: the same command goes on where this one stopped"),
        (
            "too_many_errors",
            9,
            "next: segue errors '/a b'; with a higher limits.max_error_rate the same command goes on where this one "
            "stopped",
        ),
    ],
)
def test_summary_ends_with_what_to_type_next(capsys, status, num_errors, said):
    show_summary(RunSummary(status, "/a b", errors={"X": num_errors} if num_errors else {}, num_errors=num_errors))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == said if said else not last.startswith("next")
