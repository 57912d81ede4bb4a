"""A job's prompts have the date of its first plan, however long it runs."""

import pytest
from echo_jobs import rows_of, write_input, write_job
from in_process import run_here, silent
from ready_jobs import ready_job

from segue.pipeline.plan import windows

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ strftime_now('%Y-%m-%d') }}"


@pytest.mark.usefixtures("here")
def test_window_that_is_planned_on_a_later_day_has_the_date_of_the_first(tmp_path, monkeypatch):
    job = write_job(
        write_input(tmp_path),
        prompt={"chat_template": TEMPLATE},
        plan={"window_rows": 25},
        sampling_params={"max_tokens": 10},
    )
    monkeypatch.setattr(windows, "today", lambda: "2026-01-31")
    windows.plan_first(ready_job(job), silent)
    monkeypatch.setattr(windows, "today", lambda: "2026-02-01")
    summary = run_here(job)
    assert (summary.status, summary.rows) == ("done", 60)
    assert {row["generated_text"] for row in rows_of(tmp_path / "out").values()} == {"2026-01-31"}
