"""Which rows of the input a job takes: those for which its filters hold, and of these a sample.

Filters read files in a child process with limits, as files may be hostile; everything else is arithmetic on row
numbers. Knows files and conditions; nothing of prompts, models or Ray.
"""

import operator
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

from segue.pipeline.dataset.blocks import FEW_ROWS, batch_rows_of, group_stop, read_batches
from segue.pipeline.dataset.columns import encrypted, unified
from segue.pipeline.dataset.files import InputFile, RowNumbers
from segue.pipeline.jobfile.filters import Filters
from segue.pipeline.jobfile.schema import InputConfig, LimitsConfig
from segue.pipeline.ledger.carried import carried_schema
from segue.pipeline.problems import JobRefused, Problem, nearest, shown
from segue.pipeline.processes.limited import ChildDied, LimitedProcess

KEY = "input.filters"
SAMPLED_AT_ONCE = 2**20
_COMPARED = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def check_filters(filters: Filters | None, files: Sequence[InputFile]) -> list[Problem]:
    """Columns that are in every file, and values that they can be compared with."""
    problems = []
    names = sorted({name for file in files for name in file.schema.names})
    for column in _columns(filters or ()):
        lacking = [file for file in files if file.schema.names.count(column) != 1]
        if lacking:
            got = f"{shown(column)}, which is not, or twice, in {shown(lacking[0].path)}"
            problems.append(Problem(KEY, got, "columns of every input file", nearest(column, names)))
        elif found := encrypted(files, column, KEY):
            problems += found
        elif unified(file.schema.field(column).type for file in files) is None:
            problems.append(Problem(KEY, f"{shown(column)}, of different types", "a column of one type in all files"))
    if filters and files and not problems:
        schema = _schema(filters, files)
        try:
            _numbers_in(schema.empty_table(), 0, filters)
        except (pa.ArrowException, TypeError, ValueError, ArithmeticError) as error:
            got = f"what its columns cannot be compared with: {error}"
            problems.append(Problem(KEY, got, "values of the columns' types: " + str(schema).replace("\n", ", ")))
    return problems


def selected_rows(
    files: Sequence[InputFile], config: InputConfig, limits: LimitsConfig, seed: int
) -> tuple[RowNumbers, ...]:
    """Of each file the numbers of the rows that filters and sample take. A retry takes no sample: its rows are of one
    already.

    Raises JobRefused if a filter's columns cannot be read within the limits, InputChanged, InputUnreadable.
    """
    rows: tuple[RowNumbers, ...] = tuple(range(file.num_rows) for file in files)
    if config.filters:
        rows = _filtered(files, config.filters, limits)
    if config.sample is None or config.retry_of is not None:
        return rows
    return sampled(rows, config.sample, seed)


def sampled(rows: Sequence[RowNumbers], sample: int | float, seed: int) -> tuple[RowNumbers, ...]:
    """`sample` rows, or this part of them: those whose positions have the lowest hashes, the same in all versions."""
    total = sum(map(len, rows))
    wanted = min(total, sample if isinstance(sample, int) else max(1, round(sample * total)))
    keys, kept = np.empty(0, np.uint64), np.empty(0, np.uint64)
    starts = np.cumsum([0, *map(len, rows)])
    for start in range(0, total, SAMPLED_AT_ONCE + wanted):  # so that each is partitioned a few times at most
        positions = np.arange(start, min(total, start + SAMPLED_AT_ONCE + wanted), dtype=np.uint64)
        keys, kept = np.concatenate([keys, _hashed(positions, seed)]), np.concatenate([kept, positions])
        if len(kept) > wanted:
            lowest = np.argpartition(keys, wanted - 1)[:wanted]
            keys, kept = keys[lowest], kept[lowest]
    kept = np.sort(kept).astype(np.int64)
    places = np.searchsorted(kept, starts)
    own = [kept[first:last] - start for (first, last), start in zip(pairwise(places), starts[:-1], strict=True)]
    return tuple(
        each + numbers.start if isinstance(numbers, range) else numbers[each]
        for numbers, each in zip(rows, own, strict=True)
    )


def common_rows(one: RowNumbers, other: RowNumbers) -> RowNumbers:
    """Ascending numbers that are in both."""
    if isinstance(one, range) and isinstance(other, range):
        return range(max(one.start, other.start), min(one.stop, other.stop))
    return np.intersect1d(np.asarray(one, np.int64), np.asarray(other, np.int64), assume_unique=True)


def _hashed(positions: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 (Steele et al., OOPSLA 2014) of position and seed, uint64."""
    with np.errstate(over="ignore"):
        mixed = positions + np.uint64((seed * 0xD1B54A32D192ED03 + 1) % 2**64)
        mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _filtered(files: Sequence[InputFile], filters: Filters, limits: LimitsConfig) -> tuple[RowNumbers, ...]:
    schema = _schema(filters, files)
    with LimitedProcess(limits.row_cpu_s, limits.row_memory_bytes, _warm_up) as child:
        try:
            rows = [_filtered_rows(child, file, schema, filters) for file in files]
        except pa.ArrowException:  # its message quotes rows
            got, wanted = "values in the columns that cannot be compared with its own", "values of the columns' types"
            raise JobRefused([Problem(KEY, got, wanted)]) from None
    return tuple(
        range(file.num_rows) if len(each) == file.num_rows else each for file, each in zip(files, rows, strict=True)
    )


def _filtered_rows(child: LimitedProcess, file: InputFile, schema: pa.Schema, filters: Filters) -> np.ndarray:
    """The numbers of the rows of one file. Where many rows at a time need too much memory, few are read: footers may be
    wrong about their size. Raises JobRefused."""
    found, start, is_thrifty, stuck = [np.empty(0, np.int64)], 0, False, -1
    while start < file.num_rows:
        end, batch_rows = file.num_rows, batch_rows_of(file)
        if is_thrifty:
            end, batch_rows = group_stop(file, start), FEW_ROWS
        try:
            for stop, numbers in child.stream(_matching, file, start, end, schema, filters, batch_rows):
                found.append(numbers)
                start = stop
            is_thrifty = False
        except ChildDied as death:
            if death.death != "memory" or (is_thrifty and start == stuck):
                got = f"columns whose reading ended its process ({death}), behind row {start:,} of {shown(file.path)}"
                wanted = "columns that can be read within limits.row_cpu_s and limits.row_memory_bytes"
                raise JobRefused([Problem(KEY, got, wanted)]) from None
            is_thrifty, stuck = True, start if is_thrifty else -1  # one death proves nothing: memory may be short
    return np.concatenate(found)


def _warm_up() -> None:
    """In the child: rows are not charged for what every filter needs, such as imports and Arrow's threads."""
    table = pa.table({"a": [1, 2]})
    _numbers_in(table, 0, ((("a", "==", 1),),))


def _matching(
    file: InputFile, start: int, stop: int, schema: pa.Schema, filters: Filters, batch_rows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """In the child. (number of the first row after a batch, numbers of its rows that match), in order."""
    for batch in read_batches(file, start, stop, schema, batch_rows):
        numbers = _numbers_in(pa.Table.from_batches([batch]), start, filters)
        start += batch.num_rows
        yield start, numbers


def _numbers_in(table: pa.Table, start: int, filters: Filters) -> np.ndarray:
    """Of the rows that match, counted from `start`. Only whether they match is computed: texts are not copied."""
    conditions = ([_expression(each, table.schema) for each in several] for several in filters)
    expression = reduce(operator.or_, (reduce(operator.and_, several) for several in conditions))
    name = "".join(table.column_names) + "#"  # that no column has
    numbered = table.append_column(name, pa.arange(start, start + table.num_rows))
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(numbered))
    wanted = acero.ProjectNodeOptions([pc.field(name), expression], ["number", "matches"])
    found = acero.Declaration("project", wanted, inputs=[source]).to_table(use_threads=False)
    return np.sort(found["number"].filter(found["matches"]).to_numpy())


def _expression(condition: tuple[str, str, Any], schema: pa.Schema) -> pc.Expression:
    column, sign, value = condition
    field, kind = pc.field(column), schema.field(column).type
    if value is None:
        return field.is_valid() if sign == "!=" else field.is_null()
    if sign in ("in", "not in"):
        is_in = field.isin(pa.array([_typed(each, kind).as_py() for each in value], kind))
        return is_in if sign == "in" else ~is_in
    return _COMPARED[sign](field, pc.scalar(_typed(value, kind)))


def _typed(value: Any, kind: pa.DataType) -> pa.Scalar:
    """The value in the column's type, so that the column is never converted to the value's. A date is given as text.

    Raises pa.ArrowException, TypeError, ValueError or OverflowError if the value does not fit that type.
    """
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if isinstance(value, bool) != pa.types.is_boolean(kind) or (is_number and isinstance(value, str)):
        raise TypeError(f"{shown(value)} and {kind}")
    if pa.types.is_temporal(kind) and isinstance(value, str):
        return pa.scalar(value).cast(kind)
    if pa.types.is_integer(kind) and isinstance(value, float):
        return pa.scalar(value)  # between two of them
    return pa.scalar(value, kind.value_type if pa.types.is_dictionary(kind) else kind)


def _columns(filters: Filters) -> list[str]:
    return list(dict.fromkeys(column for several in filters for column, _, _ in several))


def _schema(filters: Filters, files: Sequence[InputFile]) -> pa.Schema:
    fields = ((name, unified(file.schema.field(name).type for file in files)) for name in _columns(filters))
    return carried_schema(pa.schema([(name, kind) for name, kind in fields if kind is not None]))
