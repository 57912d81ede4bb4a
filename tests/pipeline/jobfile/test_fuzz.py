"""Whatever is in a job file, a row or a Parquet file: problems and row errors come out, never an exception or a hang.

A few examples here; `make fuzz` tries thousands.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad.parquet import GOOD, GOOD_DICTIONARY
from bad.rows import CHAT
from echo_jobs import awkward_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from render_specs import TEXT, render_spec

from segue.pipeline.dataset.blocks import InputChanged, InputUnreadable, block_of
from segue.pipeline.dataset.files import discover
from segue.pipeline.jobfile.read import read_job
from segue.pipeline.ledger.carried import carried_schema, carrier
from segue.pipeline.problems import JobRefused
from segue.pipeline.prompts.render import render_block
from segue.pipeline.prompts.rows import PlannedRowReader, RowLimits
from segue.workers.errors import MAX_MESSAGE_CHARS, RowErrorCode
from segue.workers.prompts.template import PromptTemplate

pytestmark = pytest.mark.fuzz
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

GOOD_JOB = {
    "name": "job",
    "model": {"source": "echo"},
    "input": {"path": "in", "columns": {"prompt": "x"}, "limit": 3},
    "prompt": {"messages": [{"role": "user", "content": "{x}"}], "chat_template_kwargs": {"a": 1}},
    "sampling_params": {"temperature": 0.5, "stop": ["x"], "max_tokens": 9},
    "output": {"path": "out", "columns": ["x"]},
    "workers": {"min_size": 1, "max_size": 2},
    "limits": {"max_error_rate": 0.1},
}
ODD = st.sampled_from(
    ["", " ", "\0", "..", "a" * 5000, "\U0001f600", "é", "{", "{x", "{{", "s3://", "s3://k:s@b/x", "~", "null"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | ODD
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | ODD, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spoiled_jobs(draw: st.DrawFn) -> str:
    """The good job with some of its values replaced, moved or removed, and perhaps some of its text."""
    job = json.loads(json.dumps(GOOD_JOB))
    for _ in range(draw(st.integers(1, 4))):
        section = draw(st.sampled_from(sorted(job))) if job else "name"
        where, key = (job, section)
        if isinstance(job.get(section), dict) and job[section] and draw(st.booleans()):
            where, key = job[section], draw(st.sampled_from(sorted(job[section])))
        if draw(st.booleans()):
            where[key] = draw(TREES)
        else:
            where.pop(key, None)
    text = json.dumps(job)
    if draw(st.booleans()):
        place = draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + draw(
                st.text(max_size=6) | st.sampled_from(["&a ", "*a", "!!python/name:os.system ", "<<: ", "---\n", "\t"])
            )
            + text[place:]
        )
    return text


@SHARED_FOLDER
@given(text=spoiled_jobs())
def test_job_file_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    lines, problems, has_config = outcome_of(path)
    assert lines == problems
    assert has_config == (problems == 0)


def outcome_of(path: Path) -> tuple[int, int, bool]:
    """Of a job file: (lines that are shown, problems, whether there is a job)."""
    try:
        draft = read_job(path)
    except JobRefused as refused:
        return len(str(refused).splitlines()), len(refused.problems), False
    return len(str(JobRefused(draft.problems)).splitlines()), len(draft.problems), draft.config is not None


TEXTS = st.text(max_size=40) | st.sampled_from(["<|im_start|>", "RAISE", " ", "\ue000", "\U000f0010", "a" * 3000, "\0"])
WORDS = st.binary(max_size=20) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))


def check_rows(block: pa.Table, template: PromptTemplate, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    spec = render_spec(template, prompt_columns=columns)
    rows = render_block(block, spec).to_pylist()
    assert len(rows) == block.num_rows
    for row in rows:
        assert (row["chain"] == b"") == (row["error"] is not None)
        if row["error"] is not None:
            assert row["error"]["code"] in set(RowErrorCode)
            assert len(row["error"]["message"]) <= MAX_MESSAGE_CHARS
            assert row["error"]["message"].isprintable()
    return rows


@given(
    prompts=st.lists(st.none() | WORDS, min_size=1, max_size=6),
    parameters=st.lists(st.none() | WORDS | TREES.map(lambda tree: json.dumps(tree).encode()), min_size=6, max_size=6),
)
def test_any_bytes_in_text_columns_are_answered_or_an_error_of_their_row(prompts, parameters):
    columns = {
        "prompt": pa.array(prompts, pa.binary()).view(pa.string()),
        "sampling_params": pa.array(parameters[: len(prompts)], pa.binary()).view(pa.string()),
    }
    rows = check_rows(block_of(pa.table(columns), "a", 0), TEXT, ("prompt",))
    alone = [
        check_rows(block_of(pa.table(columns).slice(n, 1), "a", n), TEXT, ("prompt",))[0] for n in range(len(prompts))
    ]
    assert rows == alone


PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "", None]), "text": st.none() | TEXTS, "url": st.none() | TEXTS}
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "root", "", None])
PART_TYPE = pa.struct([("type", pa.string()), ("text", pa.string()), ("url", pa.string())])
PART_CHATS = st.none() | st.lists(
    st.none() | st.fixed_dictionaries({"role": ROLES, "content": st.none() | st.lists(st.none() | PARTS, max_size=3)}),
    max_size=5,
)
TEXT_CHATS = st.none() | st.lists(
    st.none() | st.fixed_dictionaries({"role": ROLES, "content": st.none() | TEXTS}), max_size=5
)


@given(
    chats=st.lists(TEXT_CHATS, min_size=1, max_size=4),
    part_chats=st.lists(PART_CHATS, min_size=1, max_size=4),
    by=st.sampled_from(["message", "part"]),
)
def test_any_messages_are_answered_or_an_error_of_their_row(chats, part_chats, by):
    template = PromptTemplate(chat_template=CHAT, segment_by=by)
    for values, content in ((chats, pa.string()), (part_chats, pa.list_(PART_TYPE))):
        kind = pa.list_(pa.struct([("role", pa.string()), ("content", content)]))
        check_rows(block_of(pa.table({"messages": pa.array(values, kind)}), "a", 0), template, ("messages",))


def sound_files() -> list[bytes]:
    """Small files of several kinds."""
    files = [GOOD.content(), GOOD_DICTIONARY.content()]
    kinds: list[dict[str, Any]] = [
        {"compression": "none"},
        {"compression": "zstd", "use_dictionary": False},
        {"data_page_version": "2.0"},
    ]
    for options in kinds:
        sink = pa.BufferOutputStream()
        pq.write_table(awkward_table(0, 20), sink, row_group_size=7, **options)
        files.append(sink.getvalue().to_pybytes())
    return files


FILES = sound_files()
CONSTANT = PromptTemplate(format="text", text="x")


@SHARED_FOLDER
@given(
    file=st.sampled_from(FILES),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_bytes_in_a_file_cost_the_file_or_rows(tmp_path_factory, file, changes):
    content = bytearray(file)
    for place, value in changes:
        content[int(place * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    path.write_bytes(content)
    try:
        (found,) = discover([str(path)])
    except JobRefused:
        return
    if "prompt" not in found.schema.names or not 0 < found.num_rows < 10_000:
        return
    columns = pa.schema([field for field in found.schema if found.schema.names.count(field.name) == 1])
    if None in (carrier(field.type) for field in columns):
        return  # refused by name before planning
    columns = carried_schema(columns)
    spec = render_spec(CONSTANT, prompt_columns=(), passed_columns=tuple(columns.names))
    try:
        tables = list(
            PlannedRowReader(columns, spec, RowLimits(5, 2**28)).read(found, 0, found.num_rows, range(found.num_rows))
        )
    except (InputChanged, InputUnreadable):
        return
    rows = pa.concat_tables(tables)["src_row"].to_pylist()
    assert rows == list(range(found.num_rows))
