"""From a row to the segments of its prompt: here a prompt template meets a model's tokenizer.

Runs in plan tasks and in `Engine`. Does not know the model's weights, masks or where rows come from.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from segue.attention.segments import Segment
from segue.workers.errors import RowError
from segue.workers.models.adapter_record import AdapterRecord, template_digest
from segue.workers.prompts.chat import ChatRenderer, SegmentedText
from segue.workers.prompts.chat_template import ChatTemplate
from segue.workers.prompts.conversation import (
    Chat,
    Message,
    Part,
    check_texts,
    column_text,
    parse_kwargs,
    parse_messages,
    parse_tools,
)
from segue.workers.prompts.placeholders import Placeholder, fill_parts
from segue.workers.prompts.presets import Author, Block, Row, alpaca_blocks, commonsense_blocks, segmented, text_blocks
from segue.workers.prompts.reasoning import ReasoningMarkers, learn_markers
from segue.workers.prompts.template import PromptTemplate
from segue.workers.prompts.tokenizer import run_tokenizer

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

    `date` is the plan's, for chat templates that print one. Under the mask `causal` the messages of a chat need not be
    told apart, so all of it is one segment. Raises ValueError if the tokenizer or the chat template
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
        mask: str = "segment",
    ) -> None:
        self._rebuild: Callable[[], PromptEncoder] = partial(
            PromptEncoder, tokenizer, template, date=date, max_prompt_bytes=max_prompt_bytes, mask=mask
        )
        self._hf_tokenizer = tokenizer
        self._template = template
        self._date = date
        self._max_prompt_bytes = max_prompt_bytes
        self._mask = mask
        self._renderers: dict[str, ChatRenderer] = {}
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
        mask: str = "segment",
    ) -> "PromptEncoder":
        """An encoder with the tokenizer of a local model directory. Uses no network."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        options: dict[str, Any] = {"date": date, "max_prompt_bytes": max_prompt_bytes, "mask": mask}
        encoder = cls(tokenizer, template, **options)
        encoder._rebuild = partial(cls.from_directory, path, template, **options)
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
        chat, from_row = self._chat_of(row)
        return self._encode_chat(chat, () if may_be_blank else from_row)

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

    def encode_prompt(
        self,
        prompt: str | Sequence[Mapping[str, object]],
        *,
        tools: object = None,
        chat_template_kwargs: object = None,
    ) -> tuple[Segment, ...]:
        """A string is plain text, one causal segment. A list is chat messages. Raises RowError.

        Control tokens in either are plain text, as in rows: pass a chat as messages, not as rendered text.
        """
        if not isinstance(prompt, str):
            own = parse_kwargs(chat_template_kwargs, "chat_template_kwargs")
            chat = Chat(parse_messages(prompt), parse_tools(tools, "tools"), own)
            return self._encode_chat(chat, chat.said)
        self._check([prompt], [prompt])
        return self.encode_blocks(text_blocks([Row(prompt)]))

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of what an assistant says after a prompt. Nothing is added; it may be empty.

        Markers such as `<think>` keep their ids, all other control tokens in it are text: see `ChatRenderer.live`.
        """
        check_texts([text], from_row=[], max_bytes=self._max_prompt_bytes)
        return self._tokenizer.encode(self._tokenizer.split(text, self._live))[0]

    @property
    def reasoning_markers(self) -> ReasoningMarkers | None:
        """What the chat template writes around the reasoning of an answer; None for other formats."""
        if self._template.format != "chat" or (found := learn_markers(self._renderer.template)) is None:
            return None
        end = self._renderer.answer_end_id()
        return replace(found, end_of_turn="" if end is None else self._hf_tokenizer.decode([end]))

    @property
    def template_digest(self) -> str | None:
        """Identifies the chat template and its arguments; None for other formats."""
        if self._template.format != "chat":
            return None
        source = self._template.chat_template or self._own_chat_template(has_tools=bool(self._template.tools))
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
    def _live(self) -> frozenset[int]:
        """The markers of assistant text. A model without a chat template has none."""
        try:
            return self._renderer.live
        except ValueError:
            return frozenset()

    @property
    def _renderer(self) -> ChatRenderer:
        return self._renderer_of(has_tools=bool(self._template.tools))

    def _renderer_of(self, *, has_tools: bool) -> ChatRenderer:
        """A model may have another template for chats with tools."""
        source = self._template.chat_template or self._own_chat_template(has_tools=has_tools)
        if source not in self._renderers:
            self._renderers[source] = self._made_renderer(source)
        return self._renderers[source]

    def _made_renderer(self, source: str) -> ChatRenderer:
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
            mask=self._mask,
            segment_by=self._template.segment_by,
            continue_final_message=self._template.continue_final_message,
        )

    def _own_chat_template(self, *, has_tools: bool) -> str:
        try:
            return self._hf_tokenizer.get_chat_template(tools=[{}] if has_tools else None)
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
        read = {piece.column for piece in self._template.text_pieces if isinstance(piece, Placeholder)}
        if unread := sorted(set(self._template.trusted_columns) - read):
            raise ValueError(f"prompt.trusted_columns has {', '.join(unread)}, which prompt.text does not read")
        if self._template.format != "chat":
            return
        usual = ("user", "assistant") if self._template.continue_final_message else ("user",)
        said = tuple(Message(message.role, (Part("x"),)) for message in messages)
        try:
            self._rendered(Chat(said or tuple(Message(role, (Part("x"),)) for role in usual), self._template.tools))
        except RowError as error:
            raise ValueError(f"this model's chat template cannot be used: {error.message}") from None

    def _chat_of(self, row: Mapping[str, object]) -> tuple[Chat, list[str]]:
        """A row's chat, and the texts in it that the row itself supplied."""
        template = self._template
        messages, from_row = self._messages_of(row)
        tools, kwargs = template.tools, {}
        if template.tools_column is not None:
            tools = parse_tools(row.get(template.tools_column), f"column {template.tools_column!r}")
        if template.chat_template_kwargs_column is not None:
            name = template.chat_template_kwargs_column
            kwargs = parse_kwargs(row.get(name), f"column {name!r}")
        return Chat(messages, tools, kwargs, trusts_tools=template.tools_column is None), from_row

    def _messages_of(self, row: Mapping[str, object]) -> tuple[tuple[Message, ...], list[str]]:
        if self._template.messages is not None:
            columns = sorted({name for message in self._template.messages for name in message.columns})
            values = {column: column_text(row, column) for column in columns}
            filled = (
                Message(
                    message.role, tuple(Part.of(fill_parts(text, values)) for text in message.texts), message.is_list
                )
                for message in self._template.messages
            )
            return tuple(filled), list(values.values())
        column = self._template.chat_column(row)
        if self._template.reads_messages(column):
            messages = parse_messages(row[column])
            return messages, Chat(messages).said
        prompt = column_text(row, column)
        return (Message("user", (Part(prompt),)),), [prompt]

    def _encode_chat(self, chat: Chat, from_row: Sequence[str]) -> tuple[Segment, ...]:
        self._check(list(chat.strings), from_row)
        # A rendered chat has its own BOS, or none, so nothing is added to it.
        return self._encode(self._rendered(chat))

    def _rendered(self, chat: Chat) -> SegmentedText:
        return self._renderer_of(has_tools=bool(chat.tools)).render(chat)

    def _checked_blocks(self, row: Mapping[str, object], may_be_blank: bool) -> tuple[Block, ...] | None:
        if self._template.format == "chat":
            return None
        blocks = self._text_blocks(row) if self._template.format == "text" else self._preset_blocks(row)
        parts = [part for _, parts in blocks for part in parts]
        from_row = [part.text for part in parts if isinstance(part, Row) or part.is_trusted]
        self._check([part.text for part in parts], () if may_be_blank else from_row)
        return blocks

    def _text_blocks(self, row: Mapping[str, object]) -> tuple[Block, ...]:
        return text_blocks(
            self._column_part(row, piece.column) if isinstance(piece, Placeholder) else Author(piece)
            for piece in self._template.text_pieces
        )

    def _column_part(self, row: Mapping[str, object], column: str) -> Author | Row:
        text = column_text(row, column)
        return Author(text, is_trusted=True) if column in self._template.trusted_columns else Row(text)

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
