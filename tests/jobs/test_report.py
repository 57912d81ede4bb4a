"""The report as a browser shows it, and its numbers against what they are made of."""

import html
import itertools
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import finished_output, last_line, segue
from echo_jobs import write_job
from hypothesis import given
from hypothesis import strategies as st
from in_process import run_here

from segue.jobs.analysis.profile import Histogram, profile_of
from segue.jobs.show.report import curve, tree_boxes

CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "</dd><script>window.hit = 1; fetch('http://127.0.0.1:9/')</script>"
    "<img src='http://127.0.0.1:9/x' onerror='window.hit = 1'>"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Of an echo run whose rows are hostile in every column, in answers and in file names; some with errors."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "in").mkdir()
    shared = "Be kind to whoever asks. " * 8
    prompts = [f"{shared}{'abc'[n % 3] * 30} {HOSTILE}" for n in range(40)] + [None, "", "x" * 800]
    table = pa.table({"prompt": prompts, "note": [HOSTILE] * len(prompts), "number": range(len(prompts))})
    pq.write_table(table, folder / "in" / "<img src=x>.parquet")
    job = write_job(
        folder, sampling_params={"max_tokens": 160}, limits={"max_model_len": 700}, workers={"max_size": 1},
        output={"path": "out", "max_rows_per_file": 8},
    )  # fmt: skip
    assert run_here(job).exit_code == 0
    return folder / "out"


@pytest.fixture(scope="module")
def page(output) -> Path:
    path = output.parent / "report.html"
    code, out, err = segue("report", output, "--html", path, "--hourly-price", "3.5")
    assert code == 0, err
    assert last_line(out) == {"report": str(path), "output": str(output), "rows": 43}
    return path


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 360])
def test_report_in_a_browser_is_whole_quiet_and_inert(page, width, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": width, "height": 900})
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(page.as_uri())
        view.wait_for_load_state("networkidle")
        assert said == []
        assert asked == [page.as_uri()]
        assert view.evaluate("window.hit") is None
        assert view.locator("script, img, iframe, link, object").count() == 0
        # What rows say is there, as text.
        assert view.locator(".sample dd", has_text="onerror='window.hit = 1'").count() > 0
        # Pictures have a size, and nothing sticks out to the side.
        for name in (".tree div", "svg polyline", ".bar"):
            boxes = [box.bounding_box() for box in view.locator(name).all()]
            assert boxes
            assert any(box and box["width"] > 20 and box["height"] > 5 for box in boxes)
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        labels = view.locator(".card").all_inner_texts()
        assert any("43" in label and "of 43 rows" in label for label in labels)
        view.screenshot(path=tmp_path / "report.png", full_page=True)
        browser.close()


def test_report_has_what_ran_and_how_it_went(page, output):
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.read_text()))
    manifest = json.loads((output / "_job" / "manifest.json").read_text())
    profile = profile_of(str(output), 0)
    assert profile.manifest.fingerprint in text
    assert f"ray {manifest['versions']['ray']}" in text
    counts = {kind.code: kind.count for kind in profile.errors}
    assert counts == {"EMPTY_PROMPT": 1, "NULL_PROMPT": 1, "PROMPT_TOO_LONG": 1}
    for kind in profile.errors:
        assert kind.code in text
        assert all(row["message"] in text for row in kind.examples)
    assert f"{profile.input_tokens.total:,} prompt tokens" in text
    assert '"max_rows_per_file": 8' in text
    assert "1 workers" in text
    assert profile.seconds_at_work > 0
    assert sum(commit[1] for commit in profile.commits) == 43


def test_report_without_samples_quotes_no_row(output, tmp_path):
    code, _, _ = segue("report", output, "--html", tmp_path / "r.html", "--samples", "0")
    assert code == 0
    text = (tmp_path / "r.html").read_text()
    assert "onerror" not in text
    assert "Some rows" not in text


def test_report_of_answers_shows_how_often_each_is_given(tmp_path):
    labels = ["yes", "no", "yes", "yes", "no", "maybe"]
    folder = finished_output(tmp_path, [b"x"] * 6, [None] * 6)
    shard = next(folder.glob("part-*.parquet"))
    table = pq.read_table(shard)
    place = table.schema.get_field_index("generated_text")
    table = table.set_column(place, table.schema.field(place), pa.array(labels))
    pq.write_table(table.replace_schema_metadata(pq.read_schema(shard).metadata), shard)
    profile = profile_of(str(folder), 0)
    assert profile.answers == {"yes": 3, "no": 2, "maybe": 1}


def test_report_of_what_is_no_output_or_to_no_place_is_refused(output, tmp_path):
    assert segue("report", tmp_path)[0] == 2
    code, _, err = segue("report", output, "--html", tmp_path / "nowhere" / "r.html")
    assert code == 2
    assert "--html" in err


@given(st.lists(st.integers(0, 10_000), min_size=1), st.integers(2, 20))
def test_histogram_bins_hold_every_value_once_in_equal_widths(values, at_most):
    histogram = Histogram()
    histogram.counts.update(values)
    bins = histogram.bins(at_most)
    assert len(bins) <= at_most
    assert len({high - low for low, high, _ in bins}) == 1
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(bins))
    assert [count for *_, count in bins] == [sum(low <= value <= high for value in values) for low, high, _ in bins]
    assert sum(count for *_, count in bins) == len(values)
    assert (histogram.total, histogram.largest) == (sum(values), max(values))


def node(start: int, tokens: int, first: int, rows: int) -> dict:
    saved = tokens * (rows - 1)
    return {
        "start": start, "num_tokens": tokens, "first_request": first, "num_rows": rows, "tokens_saved": saved,
        "bidirectional": True, "first_row": "a:0",
    }  # fmt: skip


def test_tree_boxes_lie_below_what_they_go_on_from_as_wide_as_what_they_save():
    root, other = node(0, 10, 0, 9), node(0, 4, 20, 3)
    left, right, deep = node(10, 5, 0, 4), node(10, 2, 4, 5), node(12, 3, 5, 2)
    placed = tree_boxes([deep, other, right, root, left])
    boxes = {(box.node["start"], box.node["first_request"]): box for box in placed}
    below = sum(each["tokens_saved"] for each in (root, left, right, deep))
    total = below + other["tokens_saved"]
    assert [box.level for _, box in sorted(boxes.items())] == [0, 0, 1, 1, 2]
    assert boxes[0, 0].width == pytest.approx(100 * below / total, abs=0.01)
    assert boxes[10, 0].width == pytest.approx(100 * left["tokens_saved"] / total, abs=0.01)
    assert boxes[10, 4].left == pytest.approx(boxes[10, 0].left + boxes[10, 0].width, abs=0.01)
    assert boxes[12, 5].left == boxes[10, 4].left
    assert boxes[0, 20].left == pytest.approx(boxes[0, 0].width, abs=0.01)
    assert tree_boxes([]) == []


def test_curve_begins_with_the_run_and_rises_by_whole_shards():
    found = curve([(110.0, 5, 50), (120.0, 15, 150)], begin=100.0)
    assert found is not None
    assert (found.seconds, found.num_rows, found.rows_per_second, found.tokens_per_second) == (20.0, 20, 1.0, 10.0)
    assert found.points == "0.0,200.0 500.0,200.0 500.0,150.0 1000.0,150.0 1000.0,0.0"
    assert curve([], begin=None) is None
    assert curve([(5.0, 1, 1)], begin=None) is None
