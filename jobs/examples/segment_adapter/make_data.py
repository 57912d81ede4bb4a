"""Prompts for adapting a model to the segment mask: instructions that the model itself wrote, and tickets.

    python jobs/examples/segment_adapter/make_data.py seeds          the seeds for instructions
    python jobs/examples/segment_adapter/make_data.py prompts        instructions and tickets without answers

An aligned model that gets only the header of a user's message writes such a message (Xu et al., "Magpie", arXiv
2406.08464), so the instructions need no dataset. Tickets are made like those of `../triage`, from other seeds. Knows
files; README.md says which job runs between the two commands.
"""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

HERE = Path(__file__).parent
OUT = HERE / "out"  # like everything that the jobs write
SEED = 1
SAMPLES_PER_SEED = 6
MAX_TRAIN_INSTRUCTIONS = 1600
TICKET_SEEDS = (101, 102, 103)
MAX_TRAIN_TICKETS, MAX_TEST_TICKETS = 240, 100
ANSWER_TOKENS = {"general": 64, "ticket": 32}

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the model's default
TOPICS = (  # noqa: SIM905 - as a list it would be ninety lines
    "animals, art, astronomy, baking, bicycles, biology, birds, books, bread, bridges, business letters, "
    "cats, chemistry, children's games, cities, classical music, clothes, coffee, colours, computers, "
    "cooking, dogs, dreams, economics, electricity, emails, energy, family, farming, films, fish, "
    "flowers, football, forests, friendship, fruit, gardening, geography, geometry, grammar, health, "
    "history, holidays, houses, insects, jobs, kitchens, languages, law, libraries, maps, mathematics, "
    "medicine, money, mountains, museums, music, oceans, painting, philosophy, photography, physics, "
    "plants, poetry, politics, programming in Python, psychology, rain, recipes, rivers, robots, running, "
    "schools, seasons, shopping, sleep, soil, space travel, spelling, sports, stories, summaries, tea, "
    "telephones, the human body, the weather, time, trains, translation, travel, trees, vegetables, "
    "volcanoes, water, writing, writing a speech, zoos"
).split(", ")
KINDS = (
    "The user asks a short question about {topic}.",
    "The user asks for a short explanation, about {topic}.",
    "The user wants a list, about {topic}.",
    "The user gives a sentence and asks to rewrite it. It is about {topic}.",
    "The user asks to write something short about {topic}.",
)

PART = pa.struct([("type", pa.string()), ("text", pa.string())])
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))
SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),  # general | ticket
        pa.field("messages", MESSAGES),
        pa.field("sampling_params", pa.struct([("max_tokens", pa.int64())])),
    ]
)

Row = dict[str, Any]


def seed_rows() -> Iterator[Row]:
    """One row for each instruction. Rows with the same hint are drawn with different seeds."""
    for topic in TOPICS:
        for kind in KINDS:
            yield from ({"hint": kind.format(topic=topic)} for _ in range(SAMPLES_PER_SEED))


def write_seeds() -> None:
    """Write `out/seeds.parquet`."""
    OUT.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(seed_rows())), OUT / "seeds.parquet", compression="zstd")


def instructions(answers: pa.Table) -> list[str]:
    """The model's instructions, without those that are cut off, repeated, very short, very long or not plain text."""
    found: dict[str, None] = {}
    for row in answers.select(["generated_text", "finish_reason"]).to_pylist():
        text = (row["generated_text"] or "").strip()
        is_plain = re.fullmatch(r"[ -~\n\u2018-\u201d]+", text) is not None
        if row["finish_reason"] == "stop" and 12 <= len(text) <= 400 and is_plain and text.count("\n") <= 4:
            found.setdefault(text)
    return list(found)


def questions() -> list[str]:
    """The instructions that were written by hand."""
    templates = YAML(typ="safe", pure=True).load((HERE / "questions.yaml").read_text(encoding="utf-8"))
    return [template.format(item) for template, items in templates.items() for item in items]


def general_rows(texts: list[str]) -> list[Row]:
    """One row for each instruction. Three of five have a system message."""
    random = Random(SEED)
    rows = []
    for text in texts:
        system = random.choice(("", "", SYSTEM, "You answer briefly.", "You are a careful teacher. Use simple words."))
        messages = [_message("system", system)] if system else []
        rows.append(_row("general", [*messages, _message("user", text)]))
    random.shuffle(rows)
    return rows


def ticket_rows(tickets: list[Row]) -> list[Row]:
    """The messages of the triage job, one row for each ticket."""
    return [
        _row(
            "ticket",
            [
                _message("system", ticket["system_prompt"]),
                _message(
                    "user",
                    f"{ticket['rubric']}\n",
                    f"Article: {ticket['article']}\n",
                    f"Ticket from the customer: {ticket['ticket']}\n",
                    ticket["question"],
                ),
            ],
        )
        for ticket in tickets
    ]


def write_prompts() -> None:
    """Write `train.parquet` and `test.parquet` to `out/prompts`.

    The test has the instructions written by hand, and tickets of the triage example itself.
    """
    asked = questions()
    made_up = [text for text in instructions(pq.read_table(OUT / "instructions")) if text not in asked]
    demo = pq.read_table(HERE.parent / "triage" / "data").to_pylist()
    seen = {row["ticket"] for row in demo}
    make_rows = runpy.run_path(str(HERE.parent / "triage" / "make_data.py"))["make_rows"]
    own = [row for seed in TICKET_SEEDS for row in make_rows(seed) if row["ticket"] not in seen]
    Random(SEED).shuffle(own)
    Random(SEED).shuffle(demo)
    train = general_rows(made_up)[:MAX_TRAIN_INSTRUCTIONS] + ticket_rows(own[:MAX_TRAIN_TICKETS])
    test = general_rows(asked) + ticket_rows(demo[:MAX_TEST_TICKETS])
    for name, rows in (("train", train), ("test", test)):
        (OUT / "prompts").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), OUT / "prompts" / f"{name}.parquet", compression="zstd")
        print(f"{name}: {sum(row['kind'] == 'general' for row in rows)} instructions, {len(rows)} rows")


def _row(kind: str, messages: list[Row]) -> Row:
    return {"kind": kind, "messages": messages, "sampling_params": {"max_tokens": ANSWER_TOKENS[kind]}}


def _message(role: str, *parts: str) -> Row:
    return {"role": role, "content": [{"type": "text", "text": part} for part in parts]}


if __name__ == "__main__":
    {"seeds": write_seeds, "prompts": write_prompts}[sys.argv[1]]()
