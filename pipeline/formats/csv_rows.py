"""Rows of CSV and TSV files, as Python's `csv` reads them strictly, with line numbers. Every value is text or null.

A field with nothing in it is null, a quoted one (`""`) an empty text, as PostgreSQL's COPY has it. Blank lines are
skipped. Knows no types.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from segue.pipeline.formats.lines import Place, SourceRow, refused, text_lines
from segue.pipeline.problems import JobRefused, Problem, shown

MAX_FIELD_CHARS = 2**31 - 1  # csv's own limit is 131,072
QUOTE = '"'
_OTHER_DELIMITERS = ";\t|,"


def check_delimiter(delimiter: str | None) -> None:
    """Raises JobRefused for what cannot separate fields."""
    if delimiter is not None and (len(delimiter) != 1 or delimiter in f"{QUOTE}\r\n"):
        raise JobRefused([Problem("--delimiter", shown(delimiter), "one character, no quote and no line break")])


class CsvFile:
    """A file whose first record has the names of the columns.

    Raises JobRefused if there is none, if a name is repeated, or if the delimiter seems to be another; and later for a
    record that is not CSV, or has more or fewer fields than there are names.
    """

    def __init__(self, file: Path, delimiter: str, encoding: str, *, is_asked_for: bool = False) -> None:
        """`is_asked_for`: the user named the delimiter, so it is not doubted."""
        self._file, self._delimiter, self._encoding = file, delimiter, encoding
        self.names = self._header(is_asked_for)

    def rows(self) -> Iterator[SourceRow]:
        records = self._records()
        next(records)
        for place, record, fields in records:
            if len(fields) != len(self.names):
                got, wanted = (
                    f"{len(fields)} field{'s'[: len(fields) != 1]}",
                    f"{len(self.names)}, as in the first line",
                )
                raise refused(place, "", got, wanted, "texts with the delimiter in them must be quoted")
            values = _with_nulls(record, fields, self._delimiter) if "" in fields else fields
            yield SourceRow(place, len(record), dict(zip(self.names, values, strict=True)))

    def _header(self, is_asked_for: bool) -> list[str]:
        place, record, names = next(self._records(), (None, "", []))
        if place is None:
            raise JobRefused([Problem("", "no line", "names of columns in the first line", where=str(self._file))])
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            what = ", ".join(shown(name) for name in repeated)
            raise refused(place, "", f"more than one column {what}", "each name once")
        is_doubted = len(names) == 1 and not record.startswith(QUOTE) and not is_asked_for
        other = next((each for each in _OTHER_DELIMITERS if each in names[0]), None)
        if other and is_doubted:
            got = f"one column, whose name has {shown(other)} in it"
            hint = f"--delimiter {shown(other)}, or --delimiter {shown(self._delimiter)} if there is one column"
            raise refused(place, "", got, f"names separated by {shown(self._delimiter)}", hint)
        return names

    def _records(self) -> Iterator[tuple[Place, str, list[str]]]:
        """(place, text, fields) of each record."""
        csv.field_size_limit(MAX_FIELD_CHARS)
        taken: list[str] = []  # lines of the record at hand
        reader = csv.reader(
            _kept(text_lines(self._file, self._encoding), taken), delimiter=self._delimiter, strict=True
        )
        while True:
            place = Place(self._file, reader.line_num + 1)
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise refused(place, "", f"a record that is not CSV ({_reason(error)})", "CSV with names") from None
            if fields:
                yield place, "".join(taken), fields
            taken.clear()


def _kept(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _with_nulls(record: str, fields: list[str], delimiter: str) -> list[str | None]:
    """The fields, with null for those that have nothing, not even quotes."""
    if QUOTE * 2 not in record:
        return [field or None for field in fields]
    values: list[str | None] = []
    position = 0
    for field in fields:
        is_quoted = record.startswith(QUOTE, position)
        values.append(field if field or is_quoted else None)
        position += len(field) + (2 + field.count(QUOTE) if is_quoted else 0) + len(delimiter)
    return values


def _reason(error: csv.Error) -> str:
    """csv's message, in words for a person where it speaks to programmers."""
    message = str(error)
    if "new-line character" in message:
        return "a carriage return outside quotes; lines end in \\n or \\r\\n"
    return "a quote that is not closed" if "unexpected end" in message else message
