"""Where the reasoning in an answer begins and ends, by the markers that the chat template writes around it.

Knows templates, tokens and text; no engine, no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from segue.workers.errors import RowError
from segue.workers.models.echo import echo_tokenizer, is_echo
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.prompts.chat_template import ChatTemplate

_R, _C = "\U000f0007", "\U000f0008"  # characters that no template looks for or writes
# Of templates that leave reasoning out of what they show, or find it in the answer's text.
_KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
_HEADER_TOKENS = 96  # at the end of a prompt, in which a header that opens the reasoning is looked for


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The texts around reasoning in an answer, control tokens among them."""

    start: str
    end: str
    end_of_turn: str = ""  # what ends an answer in a prompt


def learn_markers(template: ChatTemplate) -> ReasoningMarkers | None:
    """The markers of a template; None if it knows of no reasoning."""
    return _shown(template) or next(
        (ReasoningMarkers(*pair) for pair in _KNOWN if pair[1] in template.source or pair[0] in template.source), None
    )


def _shown(template: ChatTemplate) -> ReasoningMarkers | None:
    """From a chat whose last answer has reasoning: what stands between the generation header and the reasoning, and
    between the reasoning and the answer."""
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": _C, "reasoning_content": _R}
    try:
        header = template.render([user], add_generation_prompt=True)
        before, found, after = template.render([user, answer], add_generation_prompt=False).partition(_R)
    except RowError:
        return None
    between, is_there, _ = after.partition(_C)
    if not found or not is_there or not between.strip():
        return None
    start = before.removeprefix(header).strip() if before.startswith(header) else ""
    return ReasoningMarkers(start or before.split()[-1], between.strip())


class ReasoningSplitter:
    """Splits generated answers."""

    def __init__(self, markers: ReasoningMarkers, tokenizer: Any) -> None:
        self._markers = markers
        self._tokenizer = tokenizer

    @classmethod
    def of_model(cls, source: str, revision: str | None, markers: ReasoningMarkers) -> "ReasoningSplitter":
        """With a model's own tokenizer."""
        if is_echo(source):
            return cls(markers, echo_tokenizer())
        from transformers import AutoTokenizer

        directory = safetensors_directory(locate(source, revision))
        return cls(markers, AutoTokenizer.from_pretrained(directory, local_files_only=True))

    def split(self, prompt: Sequence[int], answer: Sequence[int], text: str) -> tuple[str | None, str]:
        """(the reasoning or None, the text after it) of an answer's tokens and their text, which may be shorter: a stop
        string cuts it."""
        if self._is_visible:
            return self._split_text(prompt, text)
        return self._split_tokens(prompt, list(answer), text)

    @cached_property
    def _is_visible(self) -> bool:
        """Whether the markers are in the text of an answer, without its special tokens."""
        marker = self._markers.end
        return marker in self._decode(self._tokens(marker), skips=True)

    def _split_text(self, prompt: Sequence[int], text: str) -> tuple[str | None, str]:
        said = text.lstrip()
        if said.startswith(self._markers.start):
            said = said.removeprefix(self._markers.start)
        elif not self._is_open(prompt):
            return None, text
        reasoning, _, after = said.partition(self._markers.end)
        return reasoning.strip(), after.lstrip()

    def _split_tokens(self, prompt: Sequence[int], answer: list[int], text: str) -> tuple[str | None, str]:
        start, end = self._tokens(self._markers.start), self._tokens(self._markers.end)
        begin = len(start) if answer[: len(start)] == start else 0
        if not begin and not self._is_open(prompt):
            return None, text
        places = range(begin, len(answer) - len(end) + 1)
        place = next((place for place in places if answer[place : place + len(end)] == end), len(answer))
        before, reasoning, until = (
            self._decode(answer[:stop], skips=True) for stop in (begin, place, place + len(end))
        )
        after = text[len(until) :] if text.startswith(until) and place < len(answer) else ""
        said = reasoning if text.startswith(reasoning) else text
        return said[len(before) :].strip(), after.lstrip()

    def _is_open(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt's generation header, or its prefill, has opened the reasoning."""
        header, end = self._decode(prompt[-_HEADER_TOKENS:], skips=False), self._markers.end_of_turn
        header = header[header.rfind(end) + len(end) :] if end in header else header
        return header.rfind(self._markers.start) > header.rfind(self._markers.end)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _decode(self, tokens: Sequence[int], *, skips: bool) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skips, clean_up_tokenization_spaces=False)
