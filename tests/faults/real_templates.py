"""Chat templates and tokenizers of real models, which are somebody else's work and not in this repository, tried on
kinds of conversations: are the token ids those of transformers' `apply_chat_template`, and are the segments right?

    make script RUN="tests/faults/real_templates.py TEMPLATES TOKENIZERS [--each 2] [--mask segment] [--show NAME]"

TEMPLATES is a folder of .jinja files, TOKENIZERS one of tokenizer folders and .gguf files. Each template is tried with
`--each` of the tokenizers, in turn. What templates write as control tokens is added to each tokenizer. Prints a table
of outcomes: = equal, - both refuse, d refused since the template drops or repeats a text, R refused otherwise, W wrong
ids, S wrong segments.
"""

import argparse
import datetime
import functools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from segue.workers.errors import RowError
from segue.workers.prompts import encoder
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

SPECIAL = re.compile(
    r"<\|[\w./:-]+\|?>|<[\w:-]+\|>|<｜[^｜<>\s]+｜>|\[/?[A-Z][A-Z_]+\]|<(?:start|end)_of_turn>|</?s>|<bos>|<sop>|\[gMASK\]|\]~!?b\[|\]~b\]|\[e~\["
)
PLAIN = re.compile(r"</?(?:think|tool_call|tool_response|seed:think|tools|function_calls?|minimax:tool_call)>")
NAMED = re.compile(r"assistant|bot|model|<AI>", re.IGNORECASE)  # what a header says
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def said(role: str, content: object, **fields: object) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


SYSTEM, USER, ANSWER, LAST = (
    said("system", "Alpha rules apply."),
    said("user", "Bravo asks first."),
    said("assistant", "Charlie answers."),
    said("user", "Delta asks last."),
)
CALLING = said("assistant", "", tool_calls=[CALL])
RESULT = said("tool", "Echo: 12 degrees.", tool_call_id=CALL["id"], name="weather")


@dataclass(frozen=True)
class Conversation:
    """What is handed to transformers and to Segue."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    continues: bool = False


CONVERSATIONS = {
    "plain": Conversation([USER]),
    "system": Conversation([SYSTEM, USER]),
    "turns": Conversation([SYSTEM, USER, ANSWER, LAST]),
    "parts": Conversation(
        [SYSTEM, said("user", [{"type": "text", "text": "Bravo asks."}, {"type": "text", "text": "Foxtrot too."}])]
    ),
    "tools": Conversation([SYSTEM, USER], [TOOL]),
    "thinking": Conversation(
        [USER, said("assistant", "<think>\nGolf ponders.\n</think>\n\nCharlie answers."), LAST]
    ),
    "systems": Conversation([SYSTEM, said("system", "Hotel rules too."), USER]),
    "answered": Conversation([USER, ANSWER]),
    "continues": Conversation([USER, ANSWER], continues=True),
    "developer": Conversation([said("developer", "Alpha rules apply."), USER]),
    "results": Conversation([USER, CALLING, RESULT], [TOOL]),
    "name": Conversation([said("user", "Bravo asks first.", name="India"), ANSWER, LAST]),
    "empty": Conversation([said("system", ""), USER]),
    "no_think": Conversation([SYSTEM, USER, ANSWER, LAST], kwargs={"enable_thinking": False, "thinking": False}),
    "reasoning": Conversation([USER, ANSWER | {"reasoning_content": "Golf ponders."}, LAST]),
    "agent": Conversation(
        [
            SYSTEM, USER, said("assistant", "Kilo looks.", tool_calls=[CALL, CALL | {"id": "abcdef124"}]), RESULT,
            RESULT | {"tool_call_id": "abcdef124", "content": "Juliet: rain."}, ANSWER, LAST,
        ],
        [TOOL],
    ),
}  # fmt: skip


class Midnight(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime.combine(datetime.date.today(), datetime.time())


@dataclass
class Case:
    """One template with one tokenizer."""

    name: str
    source: str
    tokenizer: Any
    mask: str
    details: list[str] = field(default_factory=list)

    def outcome(self, kind: str, chat: Conversation) -> str:
        wanted, got = self._wanted(chat), self._got(chat)
        if isinstance(got, str):
            if not wanted:
                return "-"
            is_lossy = not all(self._shows_all(each, chat) for each in self._texts(chat))
            self.details.append(f"{kind}: {got}")
            return "d" if is_lossy else "R"
        ids = [token for segment in got for token in segment.token_ids]
        if ids not in wanted:
            self.details.append(f"{kind}: got    {self.tokenizer.decode(ids)!r}")
            self.details += [f"{kind}: wanted {self.tokenizer.decode(each)!r}" for each in wanted]
            return "W"
        misplaced = self._misplaced(got, chat) if self.mask == "segment" else ""
        if misplaced:
            shown = [(self.tokenizer.decode(each.token_ids), each.bidirectional) for each in got]
            self.details.append(f"{kind}: {misplaced}: {shown}")
        return "S" if misplaced else "="

    def _got(self, chat: Conversation) -> Any:
        template = PromptTemplate(
            chat_template=self.source, tools=tuple(chat.tools or ()), chat_template_kwargs=chat.kwargs,
            continue_final_message=chat.continues,
        )  # fmt: skip
        try:
            prompts = PromptEncoder(self.tokenizer, template, date=datetime.date.today(), mask=self.mask)
            return prompts.encode({"messages": chat.messages})
        except (RowError, ValueError) as error:
            return str(error)

    def _texts(self, chat: Conversation) -> list[str]:
        return [text for each in self._forms(chat) if (text := self._rendered(each)) is not None]

    def _wanted(self, chat: Conversation) -> list[list[int]]:
        """The ids that are right: of the chat as it is, or as vLLM adapts it if the template cannot show it so."""
        texts = self._texts(chat)
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def _rendered(self, chat: Conversation) -> str | None:
        try:
            return self.tokenizer.apply_chat_template(
                chat.messages, chat_template=self.source, tools=chat.tools, tokenize=False,
                add_generation_prompt=not chat.continues, continue_final_message=chat.continues, **chat.kwargs,
            )  # fmt: skip
        except Exception:  # a template raises whatever it likes
            return None

    def _forms(self, chat: Conversation) -> Iterator[Conversation]:
        text = self._rendered(chat)
        lists = [message for message in chat.messages if isinstance(message["content"], list)]
        developers = [message for message in chat.messages if message["role"] == "developer"]
        if lists and (text is None or "'type'" in text or '"type"' in text or "Bravo" not in text):
            joined = [
                message | {"content": "\n".join(part["text"] for part in message["content"])}
                if message in lists
                else message
                for message in chat.messages
            ]
            yield Conversation(joined, chat.tools, chat.kwargs, chat.continues)
        elif developers and (text is None or "Alpha" not in text):
            renamed = [message | {"role": "system"} if message in developers else message for message in chat.messages]
            yield Conversation(renamed, chat.tools, chat.kwargs, chat.continues)
        else:
            yield chat

    def _shows_all(self, text: str, chat: Conversation) -> bool:
        """Whether a rendering has every message's words, once."""
        words = [word for message in chat.messages for word in _words(message)]
        shows_tools = not chat.tools or "weather of a city" in text
        shows_calls = text.count("Oslo") == sum(len(message.get("tool_calls", ())) for message in chat.messages)
        return shows_tools and shows_calls and all(text.count(word) == 1 for word in words)

    def _misplaced(self, segments: Any, chat: Conversation) -> str:
        """What is in a segment of the wrong kind."""
        texts = [(self.tokenizer.decode(each.token_ids), each.bidirectional) for each in segments]
        shown = "".join(text for text, _ in texts)
        for message in chat.messages:
            for word in _words(message):
                if word not in shown:  # a template may leave out what is said beside calls
                    continue
                places = [is_bidirectional for text, is_bidirectional in texts if word in text]
                if places != [message["role"] != "assistant"]:
                    return f"{word} of {message['role']}"
        described = [is_bidirectional for text, is_bidirectional in texts if "weather of a city" in text]
        if described and not any(described):
            return "tools"
        said = [word for message in chat.messages for word in _words(message) if word in shown]
        after = shown.rpartition(said[-1])[2] if said else ""
        return "header" if texts[-1][1] and not chat.continues and NAMED.search(after) else ""


def _words(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    texts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    texts = [text.partition("</think>")[2] or text for text in texts]
    return [text.split()[0].strip(":") for text in texts if text.strip()]


def controls_of(sources: list[str]) -> tuple[set[str], set[str]]:
    special = {match for source in sources for match in SPECIAL.findall(source)}
    return special, {match for source in sources for match in PLAIN.findall(source)} - special


def load(path: Path, special: set[str], plain: set[str]) -> Any:
    """A tokenizer with the control tokens of all templates."""
    if path.suffix == ".gguf":
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
    there = set(tokenizer.get_added_vocab())
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(special - there)])
    backend.add_tokens([AddedToken(text, normalized=False) for text in sorted(plain - there)])
    return tokenizer


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("templates", type=Path)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--mask", default="segment")
    parser.add_argument("--show", default="")
    options = parser.parse_args()
    paths = sorted(options.templates.rglob("*.jinja"))
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    special, plain = controls_of(list(sources.values()))
    found = [path for path in sorted(options.tokenizers.iterdir()) if path.is_dir() or path.suffix == ".gguf"]
    tokenizers = {path.name: load(path, special, plain) for path in found}
    chat_template_utils.datetime = Midnight  # type: ignore  # a plan has a date, no time
    encoder.run_tokenizer = functools.cache(
        encoder.run_tokenizer
    )  # it looks at a whole tokenizer to see whether it changed
    names, total, failed = list(tokenizers), Counter(), 0
    print(f"{len(paths)} templates, {len(tokenizers)} tokenizers: {', '.join(names)}")
    print(f"{'':48} " + " ".join(kind[:5].rjust(5) for kind in CONVERSATIONS))
    for number, path in enumerate(paths):
        if options.show not in path.name:
            continue
        cases = [
            Case(path.stem, sources[path], tokenizers[names[(number + step) % len(names)]], options.mask)
            for step in range(min(options.each, len(names)))
        ]
        row = []
        for kind, chat in CONVERSATIONS.items():
            outcomes = [case.outcome(kind, chat) for case in cases]
            total.update(outcomes)
            row.append("".join(dict.fromkeys(outcomes)))
        print(f"{path.stem[:48]:48} " + " ".join(each.rjust(5) for each in row), flush=True)
        failed += any(set(each) & set("WSR") for each in row)
        details = dict.fromkeys(text for case in cases for text in case.details)
        for text in details if options.show or set("".join(row)) & set("WSR") else ():
            print("    " + text[:1500])
    print(dict(total))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
