"""A unit of work: one file of the plan, which becomes exactly one shard of the output.

It holds all that a worker needs: segments of token ids, provenance, the passed-through columns, and the rows that
already have an error. Knows Parquet; no model, no Ray.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segue.attention.segments import Segment, first_tokens, num_tokens
from segue.pipeline.ledger.carried import remembered, restored
from segue.pipeline.ledger.chains import decode_chain
from segue.pipeline.ledger.columns import ERROR_TYPE
from segue.pipeline.storage.store import OutputStorageError, Store
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.rows.params import SamplingParams
from segue.workers.scoring.rows import ScoreRow

MAX_READS = 3  # of a file whose checksum is wrong: a byte may have flipped on the way
_WAY_OUT = "restore the file, or plan again into another output.path"
FINGERPRINT = "segue.fingerprint"  # key in a unit's metadata
PASSED = "in:"  # prefix of passed-through columns inside a unit, so that no name can collide
PLANNED_FIELDS = [
    pa.field("chain", pa.large_binary()),  # see `pipeline/ledger/chains.py`; empty for a row with an error
    pa.field("src_path", pa.string()),
    pa.field("src_row", pa.int64()),
    pa.field("sampling_params", pa.string()),  # JSON: the row's own; null: the job's
    pa.field("error", ERROR_TYPE),
    pa.field("num_truncated_tokens", pa.int32()),  # of the prompt, which are not in `chain`; null after an error
]
# Only for scoring tasks. There `chain` is the smallest of the chains that the row feeds, and begins with the context.
SCORE_FIELD = pa.field(
    "score",
    pa.struct(
        [
            ("num_context_tokens", pa.int32()),
            ("continuations", pa.list_(pa.list_(pa.int32()))),
            ("sizes", pa.list_(pa.int32())),
            ("label", pa.int32()),
        ]
    ),
)


class UnitDamaged(OutputStorageError):
    """The file of a unit is gone or differs from what was planned."""


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """A unit as the manifest lists it. The names of its files depend on these fields alone, never on the attempt."""

    ordinal: int
    unit_id: str  # sha256 of the unit's file, 16 hex digits
    num_rows: int
    num_requests: int  # to the engine: a row of a scoring task has several, a row with an error has none
    num_tokens: int  # that its rows feed: prompts, and continuations without their last token
    num_errors: int = 0  # rows in which planning found an error

    @property
    def unit_name(self) -> str:
        return f"_job/units/unit-{self.ordinal:06d}-{self.unit_id}.parquet"

    @property
    def shard_name(self) -> str:
        return f"part-{self.ordinal:06d}-{self.unit_id}.parquet"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "UnitSpec":
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of a unit."""

    segments: tuple[Segment, ...]  # of the prompt
    src_path: str
    src_row: int
    params: SamplingParams
    error: RowError | None
    score: ScoreRow | None = None  # only for scoring tasks
    has_own_seed: bool = False  # in its own parameters
    num_truncated_tokens: int = 0  # of the beginning of its prompt

    @property
    def random_key(self) -> bytes:
        """Names the row for its draws: the same in every unit, batch and attempt. A seed of its own needs no name."""
        return b"" if self.has_own_seed else f"{self.src_path}:{self.src_row}".encode()


def serialize_unit(table: pa.Table, fingerprint: str, passed: pa.Schema | None = None) -> tuple[str, bytes]:
    """(unit id, file content) of a table with PLANNED_FIELDS and passed-through columns. `passed`: the types that these
    have in the input and will have in the shard, if they travel as others.

    The file holds the job's fingerprint, so two jobs never have equal files, even if their rows are equal.
    """
    sink = io.BytesIO()
    metadata = {FINGERPRINT: fingerprint, **remembered(passed or pa.schema([]))}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", write_page_checksum=True)
    content = sink.getvalue()
    return hashlib.sha256(content).hexdigest()[:16], content


def load_unit(store: Store, unit: UnitSpec) -> pa.Table:
    """The unit's table. Raises UnitDamaged if its file is gone, or not the planned one even when it is read again."""
    path = store.path(unit.unit_name)
    for _ in range(MAX_READS):
        try:
            content = store.read(unit.unit_name)
        except FileNotFoundError:
            raise UnitDamaged(f"{path} is gone, wanted the unit that was planned; {_WAY_OUT}") from None
        if hashlib.sha256(content).hexdigest()[:16] == unit.unit_id:
            return pq.read_table(io.BytesIO(content), page_checksum_verification=True)
    raise UnitDamaged(f"{path} was changed after it was planned: its sha256 is another one; {_WAY_OUT}")


def passed_columns(table: pa.Table) -> pa.Table:
    """The passed-through columns of a unit, with the names and types of the input."""
    names = [name for name in table.column_names if name.startswith(PASSED)]
    passed = table.select(names).rename_columns([name.removeprefix(PASSED) for name in names])
    return restored(passed, table.schema.metadata).replace_schema_metadata(None)


def score_value(row: ScoreRow) -> dict[str, object]:
    """A row as the `score` column holds it."""
    return {
        "num_context_tokens": num_tokens(row.context),
        "continuations": row.continuations,
        "sizes": row.sizes,
        "label": row.label,
    }


def score_row(chain: Sequence[Segment], value: dict[str, Any]) -> ScoreRow:
    """The inverse of `score_value`, given the row's chain."""
    context = first_tokens(chain, value["num_context_tokens"])
    return ScoreRow(context, tuple(map(tuple, value["continuations"])), tuple(value["sizes"]), value["label"])


def planned_rows(table: pa.Table, params: SamplingParams) -> Iterator[PlannedRow]:
    """The rows of a unit. `params` are the job's, for rows without their own."""
    columns = [table[field.name].to_pylist() for field in PLANNED_FIELDS]
    scores = table[SCORE_FIELD.name].to_pylist() if SCORE_FIELD.name in table.column_names else [None] * len(table)
    for chain, src_path, src_row, own, error, num_truncated, score in zip(*columns, scores, strict=True):
        segments = decode_chain(chain)
        given = json.loads(own) if own else {}
        row_params = params.with_row(given)
        has_own_seed = "seed" in given and row_params.seed is not None
        row_error = RowError(RowErrorCode(error["code"]), error["message"]) if error else None
        row_score = None if score is None else score_row(segments, score)
        yield PlannedRow(
            segments, src_path, src_row, row_params, row_error, row_score, has_own_seed, num_truncated or 0
        )
