"""Whether the columns a job needs are in every file, with types that fit: decided from footers, before any work.

Knows Arrow schemas and the prompt template's column names; reads no rows. Readers that merge schemas turn a missing
column into nulls and a number into text without a word; here each of these is a problem that names the file.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from pyarrow import types

from segue.pipeline.dataset.files import InputFile
from segue.pipeline.ledger.carried import carried_schema, carrier, extension_of
from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.problems import Problem, nearest, shown
from segue.workers.prompts.template import PromptTemplate
from segue.workers.scoring.template import ScoringTemplate, Task

ROW_PARAMS_COLUMN = "sampling_params"  # read from every dataset that has it, passed through or not
SHOWN_NAMES = 12  # of the columns that there are instead of one that is missing
_STRING_LIKE = "string, large_string, string_view or dictionary of string"


@dataclass(frozen=True, slots=True)
class JobColumns:
    """The columns a job reads from every file."""

    prompt: tuple[str, ...]  # the prompt template reads these
    passed: tuple[str, ...]  # these go into the results unchanged, in the order they are in there
    schema: pa.Schema  # of both together, and sampling_params if there: one type a column for all files

    @property
    def read(self) -> pa.Schema:
        """All of them, as what they are read as."""
        return carried_schema(self.schema)

    @property
    def rendered(self) -> pa.Schema:
        """The same without those that are only passed through."""
        return pa.schema([field for field in self.read if field.name in {*self.prompt, ROW_PARAMS_COLUMN}])

    @property
    def written(self) -> pa.Schema:
        """Those that are passed through, as what they are written as."""
        return pa.schema([self.schema.field(name) for name in self.passed])


def check_columns(
    files: Sequence[InputFile],
    template: PromptTemplate,
    passed: Literal["all"] | Sequence[str],
    *,
    task: Task = "generate",
    scoring: ScoringTemplate | None = None,
) -> tuple[JobColumns | None, list[Problem]]:
    """The columns of a job and what is wrong with them; None if there is anything wrong."""
    names = list(dict.fromkeys(name for file in files for name in file.schema.names))
    through = names if passed == "all" else list(passed)
    uses = _uses(template, task, scoring or ScoringTemplate(), names)
    read = sorted({name for name, use in uses if use.key != "sampling_params"})
    wanted = list(dict.fromkeys([*read, *through, *(name for name, _ in uses)]))
    problems = _collisions(through, task)
    counted = _column_counts(files)
    for name in wanted:
        own = [use for used, use in uses if used == name] or [_PASSED]
        key = own[0].key
        problems += (
            _missing(files, counted, name, key)
            or _repeated(files, counted, name)
            or encrypted(files, name, key)
            or _unfit(files, name, own)
        )
    if problems:
        return None, problems
    order = [name for name in names if name in wanted]
    schema = pa.schema([_field(files, name) for name in order])
    return JobColumns(tuple(read), tuple(through), schema), []


def columns_read(
    template: PromptTemplate, task: Task, scoring: ScoringTemplate, names: Collection[str]
) -> frozenset[str]:
    """The columns that a job reads of a dataset with these."""
    return frozenset(name for name, _ in _uses(template, task, scoring, names))


def unified(kinds: Iterable[pa.DataType]) -> pa.DataType | None:
    """The type that holds the values of all `kinds` unchanged, None if they do not agree.

    Null agrees with everything, the string types with each other; numbers of different widths do not agree: widening
    them would change what the results look like depending on which files a job reads.
    """
    distinct = list(dict.fromkeys(kind for kind in kinds if not types.is_null(kind)))
    if len(distinct) <= 1:
        return distinct[0] if distinct else pa.null()
    if all(is_text(kind) for kind in distinct):
        return pa.large_string() if pa.large_string() in distinct else pa.string()
    if all(_is_list(kind) for kind in distinct):
        value = unified(kind.value_type for kind in distinct)
        is_large = any(types.is_large_list(kind) for kind in distinct)
        return value and (pa.large_list(value) if is_large else pa.list_(value))
    if all(types.is_struct(kind) for kind in distinct):
        return _unified_struct(distinct)
    return None


def is_text(kind: pa.DataType) -> bool:
    """Whether values are strings, or all null."""
    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def is_messages(kind: pa.DataType) -> bool:
    """Whether values are chat messages: lists of structs with `role` and `content`, a text or a list of parts, or with
    ShareGPT's `from` and `value`; or a JSON text of these."""
    if is_text(kind):
        return True
    if not _is_list(kind) or not types.is_struct(kind.value_type) or _repeats_fields(kind):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    said = fields.get("content", fields.get("value", pa.int8()))
    return is_text(fields.get("role", fields.get("from", pa.int8()))) and (
        is_text(said) or (_is_list(said) and types.is_struct(said.value_type))
    )


def _repeats_fields(kind: pa.DataType) -> bool:
    """Whether a struct in it has two fields of one name, so that neither can be meant."""
    fields = [kind.field(number) for number in range(kind.num_fields)] if types.is_nested(kind) else []
    names = [field.name for field in fields] if types.is_struct(kind) else []
    return len(set(names)) < len(names) or any(_repeats_fields(field.type) for field in fields)


def _is_structs(kind: pa.DataType) -> bool:
    """Whether values are lists of structs, or JSON texts."""
    return is_text(kind) or (_is_list(kind) and types.is_struct(kind.value_type))


def _is_scalar(kind: pa.DataType) -> bool:
    return is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _is_text_list(kind: pa.DataType) -> bool:
    return _is_list(kind) and is_text(kind.value_type)


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _unified_struct(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    names = [field.name for field in kinds[0]]
    if any([field.name for field in kind] != names for kind in kinds):
        return None
    values = [unified(kind.field(i).type for kind in kinds) for i in range(len(names))]
    return None if None in values else pa.struct(list(zip(names, values, strict=True)))


@dataclass(frozen=True, slots=True)
class _Use:
    """What a job does with a column."""

    fits: Callable[[pa.DataType], bool]
    wanted: str
    key: str = "prompt"  # of the job file, where the column is named


_ANY_SCALAR = f"{_STRING_LIKE}, or int, float, bool"
_MESSAGES = _Use(is_messages, "list<struct<role: string, content: string>>, or of from and value, or a string of JSON")
_TOOLS = _Use(_is_structs, "list<struct<...>>, or a string of JSON", "prompt.tools_column")
_KWARGS = _Use(
    lambda kind: types.is_struct(kind) or is_text(kind),
    "a struct, or a string of JSON",
    "prompt.chat_template_kwargs_column",
)
_TEXT = _Use(is_text, _STRING_LIKE)
_PLACEHOLDER = _Use(_is_scalar, _ANY_SCALAR)
_SCORED = _Use(_is_scalar, _ANY_SCALAR, "scoring")
_CHOICES = _Use(lambda kind: types.is_null(kind) or _is_text_list(kind), "list<string>", "scoring.choices_column")
_LABEL = _Use(
    lambda kind: is_text(kind) or types.is_integer(kind),
    "int, the position of the right choice from 0, or string, its text",
    "scoring.label_column",
)
_ROW_PARAMS = _Use(
    lambda kind: (types.is_struct(kind) and not _repeats_fields(kind)) or is_text(kind),
    "a struct of parameters, or a string of JSON; a column of this name is each row's own sampling parameters",
    "sampling_params",
)
_PASSED = _Use(lambda kind: True, "", "output.columns")


def _uses(
    template: PromptTemplate, task: Task, scoring: ScoringTemplate, names: Collection[str]
) -> list[tuple[str, _Use]]:
    """The columns that a job reads, and how; a column may have several uses."""
    uses = [(name, use) for name, use in _told(template) if name is not None]
    prompt = template.text_columns(names)
    if template.messages is not None or template.text is not None:
        uses += [(name, _PLACEHOLDER) for name in prompt]
    else:
        is_chat = template.format == "chat"
        uses += [(name, _MESSAGES if is_chat and template.reads_messages(name) else _TEXT) for name in prompt]
    uses += [(name, _SCORED) for name in scoring.text_columns(task)]
    choices, label = scoring.list_column(task), scoring.label_of(task, names)
    uses += [(choices, _CHOICES)] if choices is not None else []
    uses += [(label, _LABEL)] if label is not None else []
    if task == "generate" and ROW_PARAMS_COLUMN in names:
        uses.append((ROW_PARAMS_COLUMN, _ROW_PARAMS))
    return uses


def _told(template: PromptTemplate) -> list[tuple[str | None, _Use]]:
    """Columns that the chat template is told beside the messages."""
    return [(template.tools_column, _TOOLS), (template.chat_template_kwargs_column, _KWARGS)]


def _collisions(through: Iterable[str], task: Task) -> list[Problem]:
    taken = [name for name in through if name in RESULT_COLUMNS[task]]
    wanted = "no passed-through column with the name of a result"
    hint = "list the columns to pass through in output.columns, or rename it in the input"
    return [Problem("output.columns", f"the input column {shown(name)}", wanted, hint) for name in taken]


def _column_counts(files: Sequence[InputFile]) -> list[Counter[str]]:
    """Of each file how often it has a name. Looked up for each column, and files mostly share one schema."""
    schemas = {id(file.schema): file.schema for file in files}
    of_schema = {key: Counter(schema.names) for key, schema in schemas.items()}
    return [of_schema[id(file.schema)] for file in files]


def _missing(files: Sequence[InputFile], counted: Sequence[Counter[str]], name: str, key: str) -> list[Problem]:
    lacking = [file for file, counts in zip(files, counted, strict=True) if name not in counts]
    if not lacking:
        return []
    got = f"{lacking[0].path} without column {shown(name)}"
    wanted = f"it in every file ({len(lacking)} of {len(files)} lack it)"
    names = lacking[0].schema.names
    return [Problem(key, got, wanted, nearest(name, names) or f"it has {_listed(names)}")]


def _listed(names: Sequence[str]) -> str:
    """Some names, and how many there are beside them."""
    some = ", ".join(shown(name) for name in names[:SHOWN_NAMES])
    return f"{some} and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else some or "none"


def _repeated(files: Sequence[InputFile], counted: Sequence[Counter[str]], name: str) -> list[Problem]:
    for file, counts in zip(files, counted, strict=True):
        if counts[name] > 1:
            got = f"{file.path} with {counts[name]} columns {shown(name)}"
            return [Problem("input.path", got, "each column name once")]
    return []


def encrypted(files: Sequence[InputFile], name: str, key: str) -> list[Problem]:
    """The first file in which a column is encrypted. `key`: of the job file, where the column is asked for."""
    for file in files:
        if name in file.encrypted:
            got = f"{file.path} with column {shown(name)}, which is encrypted"
            hint = "leave it out of output.columns, or decrypt the file before"
            return [Problem(key, got, "columns that can be read without keys", hint)]
    return []


def _unfit(files: Sequence[InputFile], name: str, uses: Sequence[_Use]) -> list[Problem]:
    """The first file whose type is not what the job can use, or not what the files before it have."""
    seen: list[pa.DataType] = []
    for file in files:
        kind = file.schema.field(name).type
        if kind in seen:
            continue
        if carrier(kind) is None:
            wanted = "a type that can be passed through; leave the column out of output.columns, or convert it"
            return [Problem("output.columns", f"{file.path} with column {shown(name)} of type {kind}", wanted)]
        for use in uses:
            if not use.fits(kind):
                return [Problem(use.key, f"{file.path} with column {shown(name)} of type {kind}", use.wanted)]
        if unified([*seen, kind]) is None:
            wanted = f"one type in all files ({unified(seen)} in {files[0].path})"
            return [Problem("input.path", f"{file.path} with column {shown(name)} of type {kind}", wanted)]
        seen.append(kind)
    return []


def _field(files: Sequence[InputFile], name: str) -> pa.Field:
    """One field for all files. It keeps the name of an extension type that is not known here."""
    fields = [file.schema.field(name) for file in files]
    first = extension_of(fields[0])
    kept = first if all(extension_of(field) == first for field in fields) else None
    return pa.field(name, unified(field.type for field in fields), metadata=kept or None)
