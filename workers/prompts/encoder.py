"""From a row to the segments of its prompt: here a prompt template meets a model's tokenizer.

Runs in plan tasks and in `Engine`. Does not know the model's weights, masks or where rows come from.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING

from segue.attention.segments import Segment
from segue.workers.errors import RowError
from segue.workers.models.adapter_record import AdapterRecord, template_digest
from segue.workers.prompts.chat import ChatRenderer, SegmentedText
from segue.workers.prompts.chat_template import ChatTemplate
from segue.workers.prompts.conversation import Message, Role, check_texts, column_text, parse_messages
from segue.workers.prompts.placeholders import Placeholder, fill
from segue.workers.prompts.presets import Author, Block, Row, alpaca_blocks, commonsense_blocks, segmented, text_blocks
from segue.workers.prompts.template import PromptTemplate
from segue.workers.prompts.tokenizer import Piece, run_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_PROMPT_BYTES = 4 * 1024 * 1024


def import_tokenizers() -> None:
    """Import in advance what takes seconds."""
    from transformers import AutoConfig, AutoTokenizer

    _ = AutoTokenizer.from_pretrained  # the attribute makes transformers import it
    AutoConfig.for_model("llama")  # so does a configuration of any kind: transformers 5.23 then imports much of itself


class PromptEncoder:
    """Turns rows into segments of token ids.

    `date` is the plan's, for chat templates that print one. Raises ValueError if the tokenizer or the chat template
    cannot be used safely, or if the chat template cannot show the messages of `template`. Can be pickled; an encoder
    made by `from_directory` is pickled as the path.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: PromptTemplate,
        *,
        date: datetime.date,
        max_prompt_bytes: int = DEFAULT_MAX_PROMPT_BYTES,
    ) -> None:
        self._rebuild: Callable[[], PromptEncoder] = partial(
            PromptEncoder, tokenizer, template, date=date, max_prompt_bytes=max_prompt_bytes
        )
        self._hf_tokenizer = tokenizer
        self._template = template
        self._date = date
        self._max_prompt_bytes = max_prompt_bytes
        self._tokenizer = run_tokenizer(tokenizer)
        self._check_template()

    @classmethod
    def from_directory(
        cls,
        path: str | PathLike[str],
        template: PromptTemplate,
        *,
        date: datetime.date,
        max_prompt_bytes: int = DEFAULT_MAX_PROMPT_BYTES,
    ) -> "PromptEncoder":
        """An encoder with the tokenizer of a local model directory. Uses no network."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        encoder = cls(tokenizer, template, date=date, max_prompt_bytes=max_prompt_bytes)
        encoder._rebuild = partial(cls.from_directory, path, template, date=date, max_prompt_bytes=max_prompt_bytes)
        return encoder

    def __reduce__(self) -> tuple[Callable[[], "PromptEncoder"], tuple[()]]:
        return (self._rebuild, ())

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's own."""
        return self._hf_tokenizer

    def encode(self, row: Mapping[str, object], *, may_be_blank: bool = False) -> tuple[Segment, ...]:
        """The row's prompt as segments, none empty. Raises RowError; not for missing text if `may_be_blank`."""
        blocks = self._checked_blocks(row, may_be_blank)
        if blocks is not None:
            return self.encode_blocks(blocks)
        messages, from_row = self._messages_of(row)
        return self._encode_chat(messages, () if may_be_blank else from_row)

    def blocks_of(self, row: Mapping[str, object]) -> tuple[Block, ...] | None:
        """The row's prompt as blocks of text, which may be blank; None for a chat. Raises RowError."""
        return self._checked_blocks(row, may_be_blank=True)

    def encode_blocks(self, blocks: Sequence[Block]) -> tuple[Segment, ...]:
        """Blocks of text as segments, none empty, with the tokens that the tokenizer adds to plain text by default."""
        return self._encode_plain(segmented(blocks, self._tokenizer.split))

    def token_ids_of_many(self, texts: Sequence[Sequence[Block]]) -> list[tuple[int, ...]]:
        """The tokens of many such texts, without segments; faster than one by one. Raises RowError."""
        for blocks in texts:
            self._check([part.text for _, parts in blocks for part in parts], ())
        pieces = [segmented(blocks, self._tokenizer.split).pieces for blocks in texts]
        return [
            self._before(ids) + ids + self._after(self._before(ids) + ids)
            for ids in self._tokenizer.encode_many(pieces)
        ]

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, object]]) -> tuple[Segment, ...]:
        """A string is plain text, one causal segment. A list is chat messages. Raises RowError.

        Control tokens in either are plain text, as in rows: pass a chat as messages, not as rendered text.
        """
        if not isinstance(prompt, str):
            messages = parse_messages(prompt)
            return self._encode_chat(messages, [part for message in messages for part in message.parts])
        self._check([prompt], [prompt])
        return self.encode_blocks(text_blocks([Row(prompt)]))

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of text that follows a prompt. Nothing is added; control tokens in it are text. May be empty."""
        check_texts([text], from_row=[], max_bytes=self._max_prompt_bytes)
        return self._tokenizer.encode([Piece(text)])[0]

    @property
    def template_digest(self) -> str | None:
        """Identifies the chat template and its arguments; None for other formats."""
        if self._template.format != "chat":
            return None
        source = self._template.chat_template or self._own_chat_template()
        return template_digest(source, self._template.chat_template_kwargs)

    def record(self, mask: str, **base: str) -> AdapterRecord:
        """The record of an adapter that is trained with these prompts. `base` describes its model."""
        prompts = {
            "prompt_format": self._template.format,
            "segment_by": self._template.segment_by,
            "chat_template": self.template_digest,
        }
        return AdapterRecord.model_validate({"mask": mask, **prompts, **base})

    def answer_end_id(self) -> int:
        """The token that ends an answer: the chat template's after an assistant message, else end-of-sequence.

        Raises ValueError if there is neither.
        """
        found = self._renderer.answer_end_id() if self._template.format == "chat" else None
        token_id = self._hf_tokenizer.eos_token_id if found is None else found
        if not isinstance(token_id, int):
            raise ValueError("the tokenizer has no end-of-sequence token, so an answer could not end")
        return token_id

    @cached_property
    def _renderer(self) -> ChatRenderer:
        source = self._template.chat_template or self._own_chat_template()
        template = ChatTemplate(
            source,
            special_tokens=self._hf_tokenizer.special_tokens_map,
            kwargs=self._template.chat_template_kwargs,
            date=self._date,
        )
        return ChatRenderer(
            template,
            self._tokenizer,
            bos=str(self._hf_tokenizer.bos_token or ""),
            segment_by=self._template.segment_by,
            continue_final_message=self._template.continue_final_message,
        )

    def _own_chat_template(self) -> str:
        try:
            return self._hf_tokenizer.get_chat_template()
        except ValueError:
            raise ValueError(
                "prompt.format chat needs a chat template and this model has none: "
                "set prompt.chat_template, or use format text, alpaca or commonsense"
            ) from None

    def _check_template(self) -> None:
        """Refuse before the first row what would fail in every row."""
        messages = self._template.messages or ()
        if any(message.content_file is not None for message in messages):
            raise ValueError("the template still names a content_file: call PromptTemplate.resolve(folder) first")
        if self._template.format != "chat":
            return
        roles: tuple[Role, ...] = tuple(message.role for message in messages)
        usual: tuple[Role, ...] = ("user", "assistant") if self._template.continue_final_message else ("user",)
        try:
            self._renderer.check_roles(roles or usual)
        except RowError as error:
            raise ValueError(f"this model's chat template cannot be used: {error.message}") from None

    def _messages_of(self, row: Mapping[str, object]) -> tuple[tuple[Message, ...], list[str]]:
        """A row's messages, and the texts among them that the row itself supplied."""
        if self._template.messages is not None:
            columns = sorted(self._template.required_columns(()))
            values = {column: column_text(row, column) for column in columns}
            filled = (
                Message(message.role, tuple(fill(text, values) for text in message.texts))
                for message in self._template.messages
            )
            return tuple(filled), list(values.values())
        if self._template.messages_column in row:
            messages = parse_messages(row[self._template.messages_column])
            return messages, [part for message in messages for part in message.parts]
        prompt = column_text(row, self._template.prompt_column)
        return (Message("user", (prompt,)),), [prompt]

    def _encode_chat(self, messages: tuple[Message, ...], from_row: Sequence[str]) -> tuple[Segment, ...]:
        self._check([message.content for message in messages], from_row)
        # A rendered chat has its own BOS, or none, so nothing is added to it.
        return self._encode(self._renderer.render(messages))

    def _checked_blocks(self, row: Mapping[str, object], may_be_blank: bool) -> tuple[Block, ...] | None:
        if self._template.format == "chat":
            return None
        blocks = self._text_blocks(row) if self._template.format == "text" else self._preset_blocks(row)
        parts = [part for _, parts in blocks for part in parts]
        from_row = [part.text for part in parts if isinstance(part, Row)]
        self._check([part.text for part in parts], () if may_be_blank else from_row)
        return blocks

    def _text_blocks(self, row: Mapping[str, object]) -> tuple[Block, ...]:
        return text_blocks(
            Row(column_text(row, piece.column)) if isinstance(piece, Placeholder) else Author(piece)
            for piece in self._template.text_pieces
        )

    def _preset_blocks(self, row: Mapping[str, object]) -> tuple[Block, ...]:
        instruction = column_text(row, self._template.instruction_column)
        has_input = row.get(self._template.input_column) is not None
        extra = column_text(row, self._template.input_column) if has_input else ""
        blocks_of = alpaca_blocks if self._template.format == "alpaca" else commonsense_blocks
        return blocks_of(instruction, extra if extra.strip() else "")

    def _check(self, texts: Sequence[str], from_row: Sequence[str]) -> None:
        check_texts(texts, from_row=from_row, max_bytes=self._max_prompt_bytes)

    def _encode_plain(self, text: SegmentedText) -> tuple[Segment, ...]:
        """Adds what the tokenizer adds to plain text by default. A BOS that the author wrote is not doubled."""
        segments = self._encode(text) or (Segment((), False),)
        first = Segment(self._before(segments[0].token_ids) + segments[0].token_ids, segments[0].bidirectional)
        segments = (first, *segments[1:])
        last = Segment(segments[-1].token_ids + self._after(segments[-1].token_ids), segments[-1].bidirectional)
        return tuple(segment for segment in (*segments[:-1], last) if segment.token_ids)

    def _before(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        prefix = self._tokenizer.prefix_ids
        return () if ids[: len(prefix)] == prefix else prefix

    def _after(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        suffix = self._tokenizer.suffix_ids
        return () if suffix and ids[-len(suffix) :] == suffix else suffix

    def _encode(self, text: SegmentedText) -> tuple[Segment, ...]:
        offsets = [border.offset for border in text.borders[1:]]
        ids = self._tokenizer.encode(text.pieces, offsets)
        segments = (
            Segment(token_ids, border.bidirectional) for token_ids, border in zip(ids, text.borders, strict=True)
        )
        return tuple(segment for segment in segments if segment.token_ids)
