"""Rows of the dataset to rows of the plan: each prompt becomes token ids, or an error.

Whatever goes wrong with one row ends here as a value in its `error`. Knows Arrow tables and the prompt encoder; no Ray,
and not the process that it runs in.
"""

import datetime
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from segue.attention.segments import Segment, canonical_segments, last_tokens, num_tokens
from segue.pipeline.dataset.columns import ROW_PARAMS_COLUMN
from segue.pipeline.dataset.files import RowNumbers
from segue.pipeline.ledger.chains import encode_chain, shared_chains
from segue.pipeline.ledger.columns import error_value
from segue.pipeline.ledger.units import PASSED, PLANNED_FIELDS, SCORE_FIELD, score_value
from segue.pipeline.processes.limited import clock_paused, tick
from segue.pipeline.storage.models import local_source
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.models.echo import echo_tokenizer, is_echo
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.prompts.conversation import too_large
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.json_values import without_nulls
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.forms import problem_of
from segue.workers.rows.params import SamplingParams
from segue.workers.scoring.pairs import PairEncoder
from segue.workers.scoring.rows import RowScorer, check_fits, requests_of
from segue.workers.scoring.template import ScoringTemplate, Task

LIMIT_NAME = "limits.max_model_len"  # what sets `max_model_len`, for messages


@dataclass(frozen=True)
class RenderSpec:
    """What a task must know: small, and the same for every task of a job."""

    source: str  # of the model, or echo
    revision: str | None
    template: PromptTemplate
    date: str  # ISO; templates that print today's date print this one
    mask: str
    max_model_len: int
    max_prompt_bytes: int
    prompt_columns: tuple[str, ...]
    passed_columns: tuple[str, ...]
    params: SamplingParams
    task: Task = "generate"
    scoring: ScoringTemplate = field(default_factory=ScoringTemplate)


def render_block(block: pa.Table, spec: RenderSpec) -> pa.Table:
    """The rows of a block of `pipeline/dataset/blocks.py`, in the columns of `planned_schema`."""
    encoder = encoder_of(spec)
    plan = _planned if spec.task == "generate" else partial(_scored, scorer=scorer_of(spec, encoder))
    inputs = _fields(block["input"])
    planned = []
    for row in _rows(inputs, block.num_rows, spec):
        planned.append(plan(row, encoder=encoder, spec=spec))
        tick()
    passed = {PASSED + name: inputs[name] for name in spec.passed_columns}
    return _table(block["src_path"], block["src_row"], planned, passed, spec)


def unplanned(src_path: str, numbers: RowNumbers, error: RowError, columns: pa.Schema, spec: RenderSpec) -> pa.Table:
    """Rows of one file that could not be read or rendered, in the columns of `planned_schema`. Passed columns are
    null."""
    rows = pa.array(numbers, pa.int64())
    paths = pa.repeat(pa.scalar(src_path, pa.string()), len(rows))
    passed = {PASSED + name: pa.nulls(len(rows), columns.field(name).type) for name in spec.passed_columns}
    return _table(paths, rows, [_failed(error)] * len(rows), passed, spec)


def planned_schema(columns: pa.Schema, spec: RenderSpec) -> pa.Schema:
    """The plan's own columns, then the passed ones. `columns` are those that are read, with one type for all files."""
    passed = [pa.field(PASSED + name, columns.field(name).type) for name in spec.passed_columns]
    return pa.schema([*planned_fields(spec.task), *passed])


def _table(
    src_path: pa.Array | pa.ChunkedArray,
    src_row: pa.Array | pa.ChunkedArray,
    planned: Sequence[Mapping[str, Any]],
    passed: Mapping[str, pa.Array | pa.ChunkedArray],
    spec: RenderSpec,
) -> pa.Table:
    origin = {"src_path": src_path, "src_row": src_row}
    fields = planned_fields(spec.task)
    own = [
        origin[field.name] if field.name in origin else pa.array([row.get(field.name) for row in planned], field.type)
        for field in fields
    ]
    return pa.table([*own, *passed.values()], names=[*(each.name for each in fields), *passed])


def planned_fields(task: Task) -> list[pa.Field]:
    """The plan's own columns for a task."""
    return PLANNED_FIELDS if task == "generate" else [*PLANNED_FIELDS, SCORE_FIELD]


def _planned(row: Mapping[str, object] | RowError, *, encoder: PromptEncoder, spec: RenderSpec) -> dict[str, Any]:
    """The row's chain, and its own parameters as JSON; or its error."""
    if isinstance(row, RowError):
        return _failed(row)
    try:
        own, params = _row_params(row.get(ROW_PARAMS_COLUMN), spec.params)
        whole = canonical_segments(encoder.encode(row), mask=spec.mask)
        segments = _truncated(whole, params, spec.max_model_len)
        _check_length(num_tokens(segments), spec)
        return {
            "chain": encode_chain(segments),
            "sampling_params": own,
            "num_truncated_tokens": num_tokens(whole) - num_tokens(segments),
        }
    except RowError as error:
        return _failed(error)


def _scored(
    row: Mapping[str, object] | RowError, *, encoder: PromptEncoder, spec: RenderSpec, scorer: RowScorer
) -> dict[str, Any]:
    """The row's chain and what is scored; or its error."""
    if isinstance(row, RowError):
        return _failed(row)
    try:
        found = scorer.read(row, spec.mask)
        requests = requests_of(found, spec.task, spec.max_model_len)
        # A training example has one token more, the end of the answer. Its last token is not fed either.
        limit = spec.max_model_len - 1 if spec.task == "finetune" else spec.max_model_len
        for request in requests:
            check_fits(request, limit, LIMIT_NAME)
        return {"chain": min(shared_chains(requests)), "score": score_value(found)}
    except RowError as error:
        return _failed(error)


def _failed(error: RowError) -> dict[str, Any]:
    return {"chain": b"", "error": error_value(error)}


def _check_length(length: int, spec: RenderSpec) -> None:
    if length == 0:
        raise RowError(RowErrorCode.EMPTY_PROMPT, "the prompt has no tokens, wanted at least one")
    if length >= spec.max_model_len:
        message = f"the prompt has {length:,} tokens, wanted fewer than {spec.max_model_len:,} ({LIMIT_NAME})"
        raise RowError(RowErrorCode.PROMPT_TOO_LONG, message)


def _truncated(segments: tuple[Segment, ...], params: SamplingParams, max_model_len: int) -> tuple[Segment, ...]:
    limit = params.max_prompt_tokens(max_model_len)
    return segments if limit is None else last_tokens(segments, limit)


def _row_params(value: object, params: SamplingParams) -> tuple[str | None, SamplingParams]:
    """A row's own parameters, checked, as JSON, and with the job's below them. Raises RowError.

    The value is a struct or a text with a JSON object.
    """
    if value is None:
        return None, params
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(RowErrorCode.BAD_PARAMS, "sampling_params is not JSON, wanted an object") from None
    if not isinstance(value, dict):
        raise RowError(RowErrorCode.BAD_PARAMS, f"sampling_params is a {type(value).__name__}, wanted an object")
    own = {name: each for name, each in value.items() if each is not None}
    together = params.with_row(own)
    outputs = together.structured_outputs
    if outputs is not None and outputs != params.structured_outputs and (problem := problem_of(outputs)):
        message = f"sampling_params.structured_outputs.{outputs.kind}: {problem}"
        raise RowError(RowErrorCode.BAD_PARAMS, message)
    return json.dumps(own), together


def _rows(
    inputs: Mapping[str, pa.ChunkedArray], num_rows: int, spec: RenderSpec
) -> Iterator[Mapping[str, object] | RowError]:
    """Of each row the values that the prompt needs, or the error why they cannot be read."""
    own = {ROW_PARAMS_COLUMN} if spec.task == "generate" and ROW_PARAMS_COLUMN in inputs else set()
    names = {*spec.prompt_columns, *own}
    limits = dict.fromkeys(names, spec.max_prompt_bytes) | {ROW_PARAMS_COLUMN: sys.maxsize}
    columns = {name: _values(inputs[name], limits[name]) for name in names}
    for name in names - own:
        if pa.types.is_nested(inputs[name].type):  # a struct has null where a mapping would lack the key
            columns[name] = [without_nulls(value) for value in columns[name]]
    for index in range(num_rows):
        row = {name: values[index] for name, values in columns.items()}
        broken = next((value for value in row.values() if isinstance(value, RowError)), None)
        yield broken or row


def _values(column: pa.ChunkedArray, max_bytes: int) -> list[object]:
    """Python values. Text that is not UTF-8, or larger than a prompt may be, is an error of its own row."""
    if _max_bytes(column) <= max_bytes:
        with suppress(UnicodeDecodeError):  # the row that has it is found below
            return column.to_pylist()
    return [_value(scalar, max_bytes) for scalar in column]


def _value(scalar: pa.Scalar, max_bytes: int) -> object:
    """A text that is too large never becomes a Python string, which may take four times its size."""
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if _is_text(scalar.type) and scalar.is_valid:
        num_bytes = scalar.as_buffer().size
        if num_bytes > max_bytes:
            return RowError(RowErrorCode.PROMPT_TOO_LARGE, too_large(num_bytes, max_bytes))
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return RowError(RowErrorCode.BAD_UTF8, "a text column holds bytes that are not UTF-8")


def _max_bytes(column: pa.ChunkedArray) -> int:
    """The size of the largest text in a column; 0 if the column has no texts."""
    kind = column.type
    texts = [chunk.dictionary for chunk in column.chunks] if pa.types.is_dictionary(kind) else column.chunks
    if not texts or not _is_text(texts[0].type):
        return 0
    # Arrow has no function for the lengths of views.
    plain = (each.cast(pa.large_string()) if each.type == pa.string_view() else each for each in texts)
    lengths = (pc.call_function("binary_length", [each]) for each in plain)
    return max(pc.call_function("max", [each]).as_py() or 0 for each in lengths)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _fields(structs: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    """The columns inside the `input` struct."""
    kind = structs.type
    chunks = [chunk.flatten() for chunk in structs.chunks]
    return {
        kind.field(i).name: pa.chunked_array([chunk[i] for chunk in chunks], kind.field(i).type)
        for i in range(kind.num_fields)
    }


def encoder_of(spec: RenderSpec) -> PromptEncoder:
    """The encoder of a job's prompts, kept between blocks: a tokenizer takes a second to load.

    Raises ValueError if tokenizer or template cannot be used safely.
    """
    template = spec.template.model_dump_json(exclude_unset=True)
    return _encoder(spec.source, spec.revision, template, spec.date, spec.max_prompt_bytes, spec.mask)


def scorer_of(spec: RenderSpec, encoder: PromptEncoder) -> RowScorer:
    """Reads the rows of a scoring task."""
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
def _encoder(
    source: str, revision: str | None, template: str, date: str, max_prompt_bytes: int, mask: str
) -> PromptEncoder:
    parsed, when = PromptTemplate.model_validate_json(template), datetime.date.fromisoformat(date)
    options: dict[str, Any] = {"date": when, "max_prompt_bytes": max_prompt_bytes, "mask": mask}
    if is_echo(source):
        return PromptEncoder(echo_tokenizer(), parsed, **options)
    with clock_paused():  # it may have to be downloaded
        directory = safetensors_directory(locate(local_source(source), revision))
    return PromptEncoder.from_directory(directory, parsed, **options)
