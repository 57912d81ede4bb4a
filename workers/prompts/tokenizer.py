"""Token ids of a prompt in which only the job's author may write control tokens.

The prompt's text is split at the control tokens. Each run of text between them is encoded by the same tokenizer without
its control tokens, so that no text can spell one. Knows text, ids and character offsets. Does not know messages,
templates or rows.
"""

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RUN = f"run-{secrets.token_hex(16)}"  # the splitter's only word, for all other text; no text can guess it
_CANARIES = (
    "Hello, world!",
    " leading and trailing ",
    "\n\nparagraph\n\n",
    "two  spaces\tand a tab",
    "1234 + 5.6e-7 = x_1",
    "Grüße, 你好, こんにちは 👋🏽",
    "system\nYou are kind.",
    "don't </b> {x} [y] ### #!",
    "\n",
    "a",
)
_MAX_CANARY_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Piece:
    """A control token, or a run of text that is encoded as nothing but text."""

    text: str
    control_id: int | None = None


class RunTokenizer:
    """A tokenizer's ids for pieces of text and control tokens.

    Control tokens are its added tokens, except those of white space alone (Gemma's, GPT-NeoX's): with these, such
    tokenizers write ordinary text. Raises ValueError if the tokenizer is not a fast one, if text can spell a control
    token's id, or if the ids run by run differ from those of the whole text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"want a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
        serialised = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        added = serialised["added_tokens"]
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in added if not _is_blank(token)}
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        self._splitter = _splitter(serialised, self.control_ids)
        found = self._splitter.get_added_tokens_decoder()
        self._control_of = {number: self.control_ids[token.content] for number, token in found.items()}
        self._first = _bare(serialised, self.control_ids)
        later = _never_first(serialised["pre_tokenizer"])
        is_same = later == serialised["pre_tokenizer"]
        self._later = self._first if is_same else _bare(serialised | {"pre_tokenizer": later}, self.control_ids)
        self._real_ids = _real_ids(self._later, added)
        self.prefix_ids, self.suffix_ids = _added_around(tokenizer)
        self._check(tokenizer)

    def split(self, text: str, live: Collection[int] | None = None) -> list[Piece]:
        """The control tokens in `text` and the runs between them, as the tokenizer itself finds them.

        If `live` is given, all other control tokens stay in the runs.
        """
        pieces, position = [], 0
        for start, end, control_id in self._found(text):
            if live is not None and control_id not in live:
                continue
            pieces.append(Piece(text[position:start]))
            pieces.append(Piece(text[start:end], control_id))
            position = end
        pieces.append(Piece(text[position:]))
        return [piece for piece in pieces if piece.text]

    def control_spans(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each control token in `text`, without the white space that it takes in."""
        return [(*_trimmed(text, start, end), token) for start, end, token in self._found(text)]

    def encode(self, pieces: Iterable[Piece], borders: Sequence[int] = ()) -> list[tuple[int, ...]]:
        """Token ids between `borders`, which are ascending character offsets in the joined text of `pieces`.

        Returns len(borders) + 1 tuples. A token that lies across a border comes after it.
        """
        ids: list[int] = []
        ends: list[int] = []
        offset = 0
        for piece in pieces:
            if piece.control_id is not None:
                ids.append(piece.control_id)
                ends.append(offset + len(piece.text))
            else:
                self._encode_run(piece.text, offset, ids, ends)
            offset += len(piece.text)
        ends = list(accumulate(ends, max))
        cuts = [0, *(bisect_right(ends, border) for border in borders), len(ids)]
        return [tuple(ids[start:stop]) for start, stop in pairwise(cuts)]

    def encode_many(self, texts: Sequence[Sequence[Piece]]) -> list[tuple[int, ...]]:
        """`encode` of many texts at once, without borders. Several times as fast as one by one."""
        runs = [
            (number, place)
            for number, text in enumerate(texts)
            for place, piece in enumerate(text)
            if piece.control_id is None
        ]
        ids: dict[tuple[int, int], list[int]] = {}
        for tokenizer, is_later in ((self._first, False), (self._later, True)):
            chosen = [(number, place) for number, place in runs if (place > 0) == is_later]
            batch = [texts[number][place].text for number, place in chosen]
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids.update((run, self._real(encoding.ids)) for run, encoding in zip(chosen, encodings, strict=True))
        return [
            tuple(
                token
                for place, piece in enumerate(text)
                for token in (ids[number, place] if piece.control_id is None else (piece.control_id,))
            )
            for number, text in enumerate(texts)
        ]

    def _encode_run(self, text: str, offset: int, ids: list[int], ends: list[int]) -> None:
        encoding = (self._later if offset else self._first).encode(text, add_special_tokens=False)
        ids += self._real(encoding.ids)
        ends += [offset + end for _, end in encoding.offsets]

    def _real(self, ids: list[int]) -> list[int]:
        return [self._real_ids.get(token, token) for token in ids] if self._real_ids else ids

    def _found(self, text: str) -> list[tuple[int, int, int]]:
        encoding = self._splitter.encode(text, add_special_tokens=False)
        return [
            (start, end, self._control_of[number])
            for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if number in self._control_of
        ]

    def _check(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse a tokenizer if the ids would differ from those of the whole text, or would not be safe."""
        unknown = getattr(tokenizer, "unk_token_id", None)
        forbidden = set(self.control_ids.values()) - {unknown}
        for content in self.control_ids:
            if forbidden & set(self.encode([Piece(content)])[0]):
                raise ValueError(
                    f"this tokenizer spells the control token {content!r} from plain text; it is not supported"
                )
        for text in self._canary_texts():
            whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if list(self.encode(self.split(text))[0]) != whole:
                raise ValueError(
                    f"this tokenizer encodes {text!r} otherwise as a whole than run by run between control tokens; "
                    "prompts from rows cannot be kept apart safely: use another tokenizer.json for this model"
                )

    def _canary_texts(self) -> list[str]:
        controls = list(self.control_ids)[:_MAX_CANARY_TOKENS] or [""]
        texts = list(_CANARIES)
        for number, control in enumerate(controls):
            before, after = _CANARIES[number % len(_CANARIES)], _CANARIES[(number * 3 + 1) % len(_CANARIES)]
            texts += [before + control + after, control + before + controls[number - 1] + control + after]
        return texts + [control + text for text in _CANARIES for control in controls[:3]]


_known: WeakKeyDictionary[Any, tuple[str, RunTokenizer]] = WeakKeyDictionary()


def run_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> RunTokenizer:
    """The RunTokenizer of a tokenizer. Making one takes half a second; it is made anew if the tokenizer has changed."""
    if not getattr(tokenizer, "is_fast", False):
        return RunTokenizer(tokenizer)  # raises, with the reason
    serialised = tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    if tokenizer not in _known or _known[tokenizer][0] != serialised:
        _known[tokenizer] = serialised, RunTokenizer(tokenizer)
    return _known[tokenizer][1]


def control_ids(pieces: Iterable[Piece]) -> tuple[int, ...]:
    """The control tokens among `pieces`, in order."""
    return tuple(piece.control_id for piece in pieces if piece.control_id is not None)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without white space at its ends, or as it is if there is nothing else in it."""
    token = text[start:end]
    indent = len(token) - len(token.lstrip())
    return (start + indent, start + len(token.rstrip())) if token.strip() else (start, end)


def _is_blank(added_token: dict[str, Any]) -> bool:
    return not added_token["special"] and not added_token["content"].replace("\u2581", " ").strip()


def _splitter(serialised: dict[str, Any], control_ids: dict[str, int]) -> Tokenizer:
    """The tokenizer's own search for added tokens, with a model that calls all other text one token."""
    added = [token for token in serialised["added_tokens"] if token["content"] in control_ids]
    renumbered = [token | {"id": number} for number, token in enumerate(added, start=1)]
    return _tokenizer(
        serialised,
        added_tokens=renumbered,
        pre_tokenizer=None,
        decoder=None,
        model={"type": "WordLevel", "vocab": {_RUN: 0}, "unk_token": _RUN},
    )


def _bare(serialised: dict[str, Any], control_ids: dict[str, int]) -> Tokenizer:
    """The same tokenizer without control tokens. Tokens of white space stay."""
    model = _without_vocabulary(serialised["model"], control_ids)
    blank = [token for token in serialised["added_tokens"] if token["content"] not in control_ids]
    try:
        return _tokenizer(serialised, added_tokens=blank, model=model)
    except Exception as error:
        raise ValueError(
            f"this tokenizer does not work without its control tokens ({error}); it is not supported"
        ) from None


def _tokenizer(serialised: dict[str, Any], **changes: Any) -> Tokenizer:
    # Post-processors trim offsets and add tokens. Runs want neither.
    parts = serialised | {"truncation": None, "padding": None, "post_processor": None} | changes
    return Tokenizer.from_str(json.dumps(parts))


def _without_vocabulary(model: dict[str, Any], control_ids: dict[str, int]) -> dict[str, Any]:
    """The model with its control tokens renamed, so that no text gives them: some models spell them by merges."""
    unknown = model.get("unk_token")
    renamed = {content: f"{_RUN}{number}" for content, number in control_ids.items() if content != unknown}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        words = {renamed.get(token, token): number for token, number in vocabulary.items()}
        return model | {"vocab": words} | _without_merges(model, renamed)
    spared = model.get("unk_id")
    pieces = [
        [piece if number == spared else renamed.get(piece, piece), score]
        for number, (piece, score) in enumerate(vocabulary)
    ]
    return model | {"vocab": pieces}


def _without_merges(model: dict[str, Any], words: Collection[str]) -> dict[str, Any]:
    """A BPE's merges without those that write one of these words: `<s>` may be HTML to it, too."""
    if not isinstance(model.get("merges"), list):
        return {}
    pairs = ((merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"])
    return {"merges": [(a, b) for a, b in pairs if not (a in words or b in words or a + b in words)]}


def _never_first(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """For runs after the first. Metaspace with `prepend_scheme: first` adds its space only where the text starts."""
    if pre_tokenizer is None:
        return None
    text = json.dumps(pre_tokenizer)
    return json.loads(re.sub(r'("prepend_scheme": )"first"', r'\1"never"', text))


def _real_ids(bare: Tokenizer, added: list[dict[str, Any]]) -> dict[int, int]:
    """The real ids of white-space tokens, which get other ids when control tokens before them are taken out."""
    real = {token["content"]: token["id"] for token in added}
    decoder = bare.get_added_tokens_decoder()
    return {number: real[token.content] for number, token in decoder.items() if number != real[token.content]}


def _added_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer puts before and after a plain text by default, often BOS."""
    with_added = tuple(tokenizer("a").input_ids)
    plain = tuple(tokenizer("a", add_special_tokens=False).input_ids)
    for start in range(len(with_added) - len(plain) + 1):
        if with_added[start : start + len(plain)] == plain:
            return with_added[:start], with_added[start + len(plain) :]
    raise ValueError("this tokenizer's special tokens change the ids of the text itself; it is not supported")
