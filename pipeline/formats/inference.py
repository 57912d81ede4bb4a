"""Which type the texts of a CSV column have, if a user asks for that: bool, int64, double, or text.

A column has another type than text only if all of its texts can be written back as they were, or, for doubles, as the
same number: `007`, `+49` and `1e400` stay text. Dates do, too. Knows texts; no files.
"""

import re
from decimal import Decimal

import pyarrow as pa

_INTEGER = re.compile(r"-?[1-9][0-9]{0,18}|0")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?")
_EXACT_DIGITS = 15  # that every double keeps


class InferredType:
    """The type of the texts that were seen."""

    def __init__(self) -> None:
        self._is_seen = False
        self._fitting = [(pa.bool_(), _is_boolean), (pa.int64(), _is_int64), (pa.float64(), _is_double)]

    def see(self, text: str | None) -> None:
        """Take a text into account; null fits every type."""
        if text is not None:
            self._is_seen = True
            self._fitting = [pair for pair in self._fitting if pair[1](text)]

    def arrow_type(self) -> pa.DataType:
        return self._fitting[0][0] if self._is_seen and self._fitting else pa.string()


def _is_boolean(text: str) -> bool:
    return text in ("true", "false", "True", "False", "TRUE", "FALSE")


def _is_int64(text: str) -> bool:
    return _INTEGER.fullmatch(text) is not None and -(2**63) <= int(text) < 2**63


def _is_double(text: str) -> bool:
    if _NUMBER.fullmatch(text) is None:
        return False
    if len(text) <= _EXACT_DIGITS and "e" not in text.lower():
        return True
    return Decimal(text) == Decimal(repr(float(text)))
