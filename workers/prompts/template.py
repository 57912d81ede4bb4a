"""The job's `prompt:` section: how the columns of a row become a prompt.

Data only: it is checked when the job is loaded, printed, and part of the fingerprint. `workers/prompts/encoder.py`
applies it to rows. Does not know tokenizers, models' chat templates or rows.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from segue.workers.prompts.conversation import Role
from segue.workers.prompts.placeholders import Placeholder, columns_in, parse_placeholders

_FORMATS_OF = {
    "messages": ("chat",),
    "messages_column": ("chat",),
    "prompt_column": ("chat", "text"),
    "chat_template": ("chat",),
    "chat_template_kwargs": ("chat",),
    "chat_template_kwargs_column": ("chat",),
    "tools": ("chat",),
    "tools_column": ("chat",),
    "trusted_columns": ("text",),
    "continue_final_message": ("chat",),
    "segment_by": ("chat",),
    "text": ("text",),
    "columns": ("alpaca", "commonsense"),
}
_RENDERERS_OWN = frozenset({"messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception"})
CONVERSATIONS = "conversations"  # the column of datasets in ShareGPT's form


class TextPart(BaseModel):
    """One part of a message's content, in OpenAI's form; `type` may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text"] = "text"  # there is no other kind
    text: str  # with {column} placeholders


class MessageTemplate(BaseModel):
    """One chat message of a prompt template: exactly one of `content` and `content_file`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role  # system, developer, user, assistant or tool
    content: str | tuple[TextPart, ...] | None = None  # with {column} placeholders
    content_file: str | None = None  # path of a text file, relative to the job file

    @model_validator(mode="after")
    def _check_content(self) -> "MessageTemplate":
        if (self.content is None) == (self.content_file is None):
            raise ValueError("a message needs exactly one of content and content_file")
        if self.content == ():
            raise ValueError("content must have at least one part, got an empty list")
        for text in self.texts:
            columns_in(text)
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The template text of each part. Empty as long as `content_file` has not been read."""
        if isinstance(self.content, tuple):
            return tuple(part.text for part in self.content)
        return () if self.content is None else (self.content,)

    @property
    def is_list(self) -> bool:
        return isinstance(self.content, tuple)

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it reads."""
        return frozenset(column for text in self.texts for column in columns_in(text))

    def resolve(self, base_dir: Path) -> "MessageTemplate":
        """With the text of `content_file` as `content`. Raises ValueError if it cannot be read as UTF-8."""
        if self.content_file is None:
            return self
        try:
            text = (base_dir / self.content_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ValueError(
                f"content_file {self.content_file!r} cannot be read ({reason}); want a text file"
            ) from None
        return MessageTemplate(role=self.role, content=text)


class PromptTemplate(BaseModel):
    """How a row becomes a prompt. Frozen; equal templates give equal prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # chat: the model's own template; text: `text`, as it is
    format: Literal["chat", "text", "alpaca", "commonsense"] = "chat"
    segment_by: Literal["message", "part"] = "message"  # part: borders between content parts too
    # the chat, with {column} placeholders
    messages: Annotated[tuple[MessageTemplate, ...], Field(min_length=1)] | None = None
    # read as it is if `messages` is not given and the dataset has it: OpenAI's form or ShareGPT's, or JSON text of it
    messages_column: str = "messages"
    prompt_column: str = "prompt"  # else this column is one user message; without it, a column `conversations` is read
    tools: tuple[dict[str, Any], ...] = ()  # definitions of tools, as JSON schemas, for the chat template
    tools_column: str | None = None  # else each row's own: a list of definitions, or JSON text of it
    text: str | None = None  # template of format text; the prompt column alone if not given
    columns: dict[Literal["instruction", "input"], str] = {}  # what the presets read, if named otherwise
    chat_template: str | None = None  # Jinja, in place of the model's own
    chat_template_kwargs: dict[str, Any] = {}  # what the chat template is told, such as enable_thinking
    chat_template_kwargs_column: str | None = None  # each row's own on top: a struct, or JSON text
    continue_final_message: StrictBool = False  # the last message is the beginning of the answer
    # of format text: columns whose text may write control tokens, such as chats that were rendered before
    trusted_columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_together(self) -> "PromptTemplate":
        for name in sorted(self.model_fields_set & _FORMATS_OF.keys()):
            wanted = _FORMATS_OF[name]
            if self.format not in wanted and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing to format {self.format}; want format {' or '.join(wanted)}")
        if reserved := sorted(_RENDERERS_OWN & self.chat_template_kwargs.keys()):
            raise ValueError(f"chat_template_kwargs must not have {', '.join(reserved)}: the renderer sets them")
        if self.tools and self.tools_column is not None:
            raise ValueError("tools are the job's or each row's own: give one of tools and tools_column")
        if self.continue_final_message and self.messages and self.messages[-1].role != "assistant":
            raise ValueError(
                f"continue_final_message wants a last message of role assistant, got {self.messages[-1].role}"
            )
        columns_in(self.text or "")
        return self

    @property
    def text_pieces(self) -> tuple[str | Placeholder, ...]:
        """Format text: literal text and placeholders, in order."""
        return (Placeholder(self.prompt_column),) if self.text is None else parse_placeholders(self.text)

    @property
    def instruction_column(self) -> str:
        return self.columns.get("instruction", "instruction")

    @property
    def input_column(self) -> str:
        """The column of the input. It may be missing, null or blank: the presets have wording for that."""
        return self.columns.get("input", "input")

    def resolve(self, base_dir: Path | str) -> "PromptTemplate":
        """The same template with every `content_file`, relative to `base_dir`, read. Raises ValueError."""
        if self.messages is None:
            return self
        messages = tuple(message.resolve(Path(base_dir)) for message in self.messages)
        if messages == self.messages:
            return self
        return PromptTemplate.model_validate(self.model_dump(exclude_unset=True) | {"messages": messages})

    def required_columns(self, available: Collection[str]) -> frozenset[str]:
        """The columns that a prompt reads. `available` are those that the dataset has.

        If a column of the result is not in `available`, the job has an error: a misspelt placeholder, or a dataset
        without a prompt.
        """
        told = (self.tools_column, self.chat_template_kwargs_column)
        return self.text_columns(available) | {name for name in told if name is not None}

    def text_columns(self, available: Collection[str]) -> frozenset[str]:
        """Those of them with the text of the prompt."""
        return frozenset(self._columns_read(available))

    def _columns_read(self, available: Collection[str]) -> Iterator[str]:
        if self.format == "text":
            yield from (piece.column for piece in self.text_pieces if isinstance(piece, Placeholder))
        elif self.format != "chat":
            yield self.instruction_column
            yield from {self.input_column} & set(available)
        elif self.messages is not None:
            for message in self.messages:
                yield from message.columns
        else:
            yield self.chat_column(available)

    def chat_column(self, available: Collection[str]) -> str:
        """The column of the chat, or of the user's message, if the job gives no messages."""
        if self.messages_column in available:
            return self.messages_column
        return (
            CONVERSATIONS if CONVERSATIONS in available and self.prompt_column not in available else self.prompt_column
        )

    def reads_messages(self, column: str) -> bool:
        """Whether a column that the chat is read from holds messages, not one text."""
        return column == self.messages_column or (column == CONVERSATIONS and column != self.prompt_column)
