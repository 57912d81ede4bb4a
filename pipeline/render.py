"""The plan's map tasks: rows of the dataset to rows of the plan, with prompts as token ids or an error.

Everything that can go wrong with one row ends here as a value in its `error`. Runs inside Ray Data tasks, but knows
Arrow tables and the prompt encoder only.
"""

import datetime
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from attention.segments import canonical_segments, num_tokens
from pipeline.chains import encode_chain, shared_chains
from pipeline.remote_models import local_source
from pipeline.results import error_value
from pipeline.schemas import ROW_PARAMS_COLUMN
from pipeline.units import PASSED, PLANNED_FIELDS, SCORE_FIELD, score_value
from workers.echo import echo_tokenizer, is_echo
from workers.model_source import locate, safetensors_directory
from workers.pairs import PairEncoder
from workers.prompt_encoder import PromptEncoder
from workers.prompts import PromptTemplate
from workers.row_errors import RowError, RowErrorCode
from workers.sampling import SamplingParams
from workers.score_rows import RowScorer, check_fits, requests_of
from workers.scoring import ScoringTemplate, Task


@dataclass(frozen=True)
class RenderSpec:
    """What a task must know; small, and the same for every task of a job."""

    source: str  # of the model, or echo
    revision: str | None
    template: PromptTemplate
    date: str  # ISO; templates that print today's date print this one
    mask: str
    max_model_len: int
    window: int | None  # the sliding window, if that is what limits the length
    max_prompt_bytes: int
    prompt_columns: tuple[str, ...]
    passed_columns: tuple[str, ...]
    params: SamplingParams
    task: Task = "generate"
    scoring: ScoringTemplate = field(default_factory=ScoringTemplate)

    @property
    def limit_name(self) -> str:
        """What `max_model_len` comes from."""
        return f"sliding window of {self.window}" if self.window == self.max_model_len else "limits.max_model_len"


def render_block(block: pa.Table, spec: RenderSpec) -> pa.Table:
    """A block of `pipeline.rows` -> the same rows with PLANNED_FIELDS and passed-through columns."""
    encoder = encoder_of(spec)
    plan = _planned if spec.task == "generate" else partial(_scored, scorer=scorer_of(spec, encoder))
    inputs = _fields(block["input"])
    planned = [plan(row, encoder=encoder, spec=spec) for row in _rows(inputs, block.num_rows, spec)]
    fields = planned_fields(spec.task)
    columns: dict[str, Any] = {"src_path": block["src_path"], "src_row": block["src_row"]}
    columns |= {each.name: [row.get(each.name) for row in planned] for each in fields if each.name not in columns}
    arrays = [_as_array(columns[each.name], each.type) for each in fields]
    passed = {PASSED + name: inputs[name] for name in spec.passed_columns}
    return pa.table([*arrays, *passed.values()], names=[*(each.name for each in fields), *passed])


def planned_fields(task: Task) -> list[pa.Field]:
    """The plan's own columns."""
    return PLANNED_FIELDS if task == "generate" else [*PLANNED_FIELDS, SCORE_FIELD]


def _planned(row: Mapping[str, object] | RowError, *, encoder: PromptEncoder, spec: RenderSpec) -> dict[str, Any]:
    """chain, and the row's parameters as JSON; or error"""
    try:
        if isinstance(row, RowError):
            raise row
        params = _row_params(row.get(ROW_PARAMS_COLUMN), spec.params)
        segments = canonical_segments(encoder.encode(row), mask=spec.mask)
        _check_length(num_tokens(segments), spec)
        return {"chain": encode_chain(segments), "sampling_params": params}
    except RowError as error:
        return {"chain": b"", "error": error_value(error)}


def _scored(
    row: Mapping[str, object] | RowError, *, encoder: PromptEncoder, spec: RenderSpec, scorer: RowScorer
) -> dict[str, Any]:
    """chain, and what is scored; or error"""
    try:
        if isinstance(row, RowError):
            raise row
        found = scorer.read(row, spec.mask)
        requests = requests_of(found, spec.task, spec.max_model_len)
        # What is learned ends with a token more than the answer, which is not fed either.
        limit = spec.max_model_len - 1 if spec.task == "finetune" else spec.max_model_len
        for request in requests:
            check_fits(request, limit, spec.limit_name)
        return {"chain": min(shared_chains(requests)), "score": score_value(found)}
    except RowError as error:
        return {"chain": b"", "error": error_value(error)}


def _check_length(length: int, spec: RenderSpec) -> None:
    if length == 0:
        raise RowError(RowErrorCode.EMPTY_PROMPT, "the prompt has no tokens, wanted at least one")
    if length >= spec.max_model_len:
        message = f"the prompt has {length:,} tokens, wanted fewer than {spec.max_model_len:,} ({spec.limit_name})"
        raise RowError(RowErrorCode.PROMPT_TOO_LONG, message)


def _row_params(value: object, params: SamplingParams) -> str | None:
    """A row's own parameters, checked, as JSON. They come as a struct or as a JSON object."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(RowErrorCode.BAD_PARAMS, "sampling_params is not JSON, wanted an object") from None
    if not isinstance(value, dict):
        raise RowError(RowErrorCode.BAD_PARAMS, f"sampling_params is a {type(value).__name__}, wanted an object")
    own = {name: each for name, each in value.items() if each is not None}
    params.with_row(own)
    return json.dumps(own)


def _rows(
    inputs: Mapping[str, pa.ChunkedArray], num_rows: int, spec: RenderSpec
) -> Iterator[Mapping[str, object] | RowError]:
    """What the prompt reads of each row, or why it cannot be read."""
    names = [*spec.prompt_columns]
    if spec.task == "generate" and ROW_PARAMS_COLUMN in inputs:
        names.append(ROW_PARAMS_COLUMN)
    columns = {name: _values(inputs[name]) for name in dict.fromkeys(names)}
    for index in range(num_rows):
        row = {name: values[index] for name, values in columns.items()}
        broken = next((value for value in row.values() if isinstance(value, RowError)), None)
        yield broken or row


def _values(column: pa.ChunkedArray) -> list[object]:
    """Python values; text that is not UTF-8 costs its own row, not the block."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return RowError(RowErrorCode.BAD_UTF8, "a text column holds bytes that are not UTF-8")


def _fields(structs: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    """The columns inside the `input` struct."""
    kind = structs.type
    chunks = [chunk.flatten() for chunk in structs.chunks]
    return {
        kind.field(i).name: pa.chunked_array([chunk[i] for chunk in chunks], kind.field(i).type)
        for i in range(kind.num_fields)
    }


def _as_array(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def encoder_of(spec: RenderSpec) -> PromptEncoder:
    """Kept between blocks: Ray runs many tasks in one process, and a tokenizer takes a second to load.

    Raises ValueError if tokenizer or template cannot be used safely.
    """
    template = spec.template.model_dump_json(exclude_unset=True)
    return _encoder(spec.source, spec.revision, template, spec.date, spec.max_prompt_bytes)


def scorer_of(spec: RenderSpec, encoder: PromptEncoder) -> RowScorer:
    """For a scoring task's rows."""
    delimiter = spec.scoring.delimiter(spec.template.format)
    pairs = PairEncoder(encoder, encoder.tokenizer)
    return RowScorer(
        pairs,
        spec.task,
        spec.scoring,
        delimiter=delimiter,
        max_bytes=spec.max_prompt_bytes,
        max_model_len=spec.max_model_len,
    )


@functools.lru_cache(maxsize=2)
def _encoder(source: str, revision: str | None, template: str, date: str, max_prompt_bytes: int) -> PromptEncoder:
    parsed, when = PromptTemplate.model_validate_json(template), datetime.date.fromisoformat(date)
    if is_echo(source):
        return PromptEncoder(echo_tokenizer(), parsed, date=when, max_prompt_bytes=max_prompt_bytes)
    directory = safetensors_directory(locate(local_source(source), revision))
    return PromptEncoder.from_directory(directory, parsed, date=when, max_prompt_bytes=max_prompt_bytes)
