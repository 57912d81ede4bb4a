"""Rows that cannot be answered cost themselves alone, rows with parameters of their own change themselves alone. A
damaged unit and an input file that changed end the run in one clear error."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import awkward_table, origins, rows_of, shards_in, write_input, write_job
from in_process import run_here, silent
from ready_jobs import ready_job

from segue.pipeline.dataset.blocks import InputChanged
from segue.pipeline.ledger.manifest import SUCCESS
from segue.pipeline.run.run import plan_job, run_job
from segue.pipeline.storage.store import OutputStorageError


def write_prompts(folder, table: pa.Table) -> None:
    (folder / "in").mkdir()
    pq.write_table(table, folder / "in" / "a.parquet")


def test_run_bad_rows_cost_themselves_in_one_schema(tmp_path):
    prompts = ["fine", None, "", " \n", "x" * 300, "raise", "also fine", b"\xff\xfe", "last"]
    texts = [p.encode() if isinstance(p, str) else p for p in prompts]
    write_prompts(
        tmp_path, pa.table({"prompt": pa.array(texts, pa.binary()).view(pa.string()), "n": range(len(texts))})
    )
    template = (
        "{% for m in messages %}{% if m.content == 'raise' %}{{ raise_exception('no') }}{% endif %}"
        "<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    )
    output = {"path": "out", "max_rows_per_file": 3}
    job = write_job(tmp_path, prompt={"chat_template": template}, output=output, limits={"max_model_len": 200})
    summary = run_here(job)
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


def test_run_row_parameters_that_are_not_passed_through_still_count(tmp_path):
    own = ['{"max_tokens": 2}', '{"n": 3, "logprobs": 1}', None, '{"max_tokens": -1}']
    write_prompts(tmp_path, pa.table({"prompt": ["abcdefgh"] * 4, "sampling_params": own}))
    prompt, output = {"format": "text", "text": "{prompt}"}, {"path": "out", "columns": []}
    run_here(write_job(tmp_path, prompt=prompt, output=output))
    rows = [row for _, row in sorted(rows_of(tmp_path / "out").items())]
    assert [row["generated_text"] for row in rows] == ["gh", "cdefgh", "cdefgh", None]
    assert [len(row["samples"] or []) for row in rows] == [1, 3, 1, 0]
    assert [len(row["logprobs"] or []) for row in rows] == [0, 6, 0, 0]
    assert rows[3]["error"]["code"] == "BAD_PARAMS"
    assert "sampling_params" not in rows[0]


def test_run_many_samples_with_logprobs_have_their_columns(tmp_path):
    run_here(write_job(write_input(tmp_path), sampling_params={"max_tokens": 4, "n": 2, "logprobs": 1}))
    for row in rows_of(tmp_path / "out").values():
        first, second = row["samples"]
        assert first["generated_text"] == second["generated_text"] == row["generated_text"]
        assert len(row["logprobs"]) == len(second["logprobs"]) == 4
        assert [top["token_id"] for top in row["logprobs"][0]["top"]] == [row["logprobs"][0]["token_id"]]


def test_run_corrupt_input_page_costs_its_rows(tmp_path):
    folder = write_input(tmp_path)
    path = folder / "in" / "b.parquet"
    pq.write_table(awkward_table(30, 60), path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = path.read_bytes()
    place = content.index(b"number 45")
    path.write_bytes(content[:place] + b"N" + content[place + 1 :])
    summary = run_here(write_job(folder), "limits.max_error_rate=1")
    assert (summary.status, summary.errors) == ("done", {"INPUT_CORRUPT": 30})
    rows = rows_of(folder / "out")
    assert set(rows) == origins()
    assert {key[0] for key, row in rows.items() if row["error"]} == {"b.parquet"}


def test_run_unit_that_was_tampered_with_ends_in_one_clear_error(here, tmp_path):
    job = write_job(write_input(tmp_path))
    manifest = plan_job(ready_job(job), silent)
    unit = tmp_path / "out" / manifest.units[2].unit_name
    content = unit.read_bytes()
    unit.write_bytes(content[:100] + b"?" + content[101:])
    with pytest.raises(OutputStorageError, match=unit.name) as failed:
        run_here(job)
    assert len(str(failed.value).splitlines()) == 1
    assert not (tmp_path / "out" / SUCCESS).exists()
    unit.write_bytes(content)
    assert run_here(job).status == "done"
    assert set(rows_of(tmp_path / "out")) == origins()


def test_run_input_that_changes_after_the_check_is_one_clear_error(here, tmp_path):
    ready = ready_job(write_job(write_input(tmp_path)))
    os.utime(tmp_path / "in" / "b.parquet", ns=(1, 1))
    with pytest.raises(InputChanged, match=r"b\.parquet") as failed:
        run_job(ready, silent, quiet=True)
    assert len(str(failed.value).splitlines()) == 1
