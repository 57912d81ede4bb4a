"""Conditions on rows as a job file has them: lists of column, sign and value, as pyarrow's and pandas' filters.

Data only: `pipeline/dataset/selection.py` carries them out.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError


def _as_alternatives(value: object) -> object:
    """Conditions that must all hold, or several lists of such; as tuples."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(each, list) and each and isinstance(each[0], str) for each in value):
        value = [value]
    return _tuples(value)


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_filters(filters: "Filters") -> "Filters":
    for column, operator, value in (condition for several in filters for condition in several):
        if (operator in ("in", "not in")) != isinstance(value, tuple):
            raise PydanticCustomError("filter", "a list of values after in and not in, one value after the others")
        if value is None and operator not in ("=", "==", "!="):
            raise PydanticCustomError("filter", "null after = and != only")
        if not column:
            raise PydanticCustomError("filter", "a column's name first")
    return filters


_Scalar = str | bool | int | float | None
_Condition = tuple[str, Literal["=", "==", "!=", "<", "<=", ">", ">=", "in", "not in"], _Scalar | tuple[_Scalar, ...]]
Filters = Annotated[
    tuple[Annotated[tuple[_Condition, ...], Field(min_length=1)], ...],
    BeforeValidator(_as_alternatives),
    Field(min_length=1),
    AfterValidator(_check_filters),
    WithJsonSchema({"type": "array", "items": {"type": "array"}, "minItems": 1}),
]
