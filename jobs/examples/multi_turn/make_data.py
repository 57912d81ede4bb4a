"""Writes the multi-turn example: 60 conversations that branch from ten common beginnings.

Knows `conversations.yaml` and a seed; nothing of models, prompts or the pipeline.
Run it as `python jobs/examples/multi_turn/make_data.py`; the same seed always gives the same rows.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

HERE = Path(__file__).parent
SEED = 20251103
ROWS_PER_GROUP = 20

MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
SCHEMA = pa.schema(
    [
        pa.field("conversation_id", pa.string(), nullable=False),
        pa.field("beginning", pa.string(), nullable=False),  # rows with the same one share their first turns
        pa.field("num_exchanges", pa.int32(), nullable=False),  # question and answer pairs before the last question
        pa.field("messages", pa.list_(MESSAGE)),
    ]
)

Content = dict[str, Any]
Row = dict[str, Any]


def make_rows(seed: int = SEED) -> list[Row]:
    """All 60 rows, shuffled, so that branches of one beginning are not neighbours in the file."""
    content: Content = YAML(typ="safe", pure=True).load((HERE / "conversations.yaml").read_text(encoding="utf-8"))
    rows = [row for beginning in content["beginnings"] for row in _branches(beginning, content["assistants"])]
    Random(seed).shuffle(rows)
    return rows


def make_table(seed: int = SEED) -> pa.Table:
    """The rows with the example's schema."""
    return pa.Table.from_pylist(make_rows(seed), schema=SCHEMA)


def _branches(beginning: Content, assistants: dict[str, str]) -> Iterator[Row]:
    """One row for each ending: the exchanges before it, then its question."""
    for number, ending in enumerate(beginning["endings"], start=1):
        messages = [{"role": "system", "content": assistants[beginning["assistant"]]}]
        for question, answer in beginning["exchanges"][: ending["after"]]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {
            "conversation_id": f"{beginning['id']}-{number}",
            "beginning": beginning["id"],
            "num_exchanges": ending["after"],
            "messages": [*messages, {"role": "user", "content": ending["ask"]}],
        }


def write_all(folder: Path = HERE) -> None:
    """Writes `data/conversations.parquet`, replacing what is there."""
    (folder / "data").mkdir(exist_ok=True)
    path = folder / "data" / "conversations.parquet"
    pq.write_table(make_table(), path, compression="zstd", row_group_size=ROWS_PER_GROUP)


if __name__ == "__main__":
    write_all()
