"""Strict YAML 1.2: one document of plain values, and the line of each of them.

Refuses what makes YAML surprising or dangerous: duplicate keys, anchors and aliases, tags, other versions, keys that
are not strings, deep nesting. Knows nothing of what the values mean.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from segue.pipeline.problems import Problem, one_line, shown

MAX_YAML_BYTES = 1_000_000
MAX_DEPTH = 32
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
Path = tuple[str | int, ...]  # keys and list positions from the top


@dataclass
class YamlDocument:
    """What was read, as far as it could be read."""

    value: object = None  # dicts, lists and scalars
    lines: dict[Path, int] = field(default_factory=dict)  # 1-based line of each key and item
    problems: list[Problem] = field(default_factory=list)


def as_yaml(value: object) -> str:
    """A value of JSON's kinds as text that `read_yaml` reads back unchanged. JSON is YAML, except for characters that
    YAML refuses or takes for line breaks."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read_yaml(text: str, name: str) -> YamlDocument:
    """The only document of `text`; `name` is what problems call the file."""
    document = YamlDocument()
    try:
        document.problems += _forbidden(YAML(typ="safe", pure=True).parse(text), name)
        if not document.problems:
            yaml = YAML(typ="safe", pure=True)
            root = yaml.compose(text)
            if root is not None:
                document.value = _Builder(yaml, name, document).build(root, ())
    except YAMLError as error:
        document.problems.append(_syntax_problem(error, name))
    return document


def key_of(path: Path) -> str:
    """The path as people write it: a.b.0."""
    return ".".join(str(part) for part in path)


def _syntax_problem(error: YAMLError, name: str) -> Problem:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        detail = one_line(str(error.problem or error.context))
        return Problem("", detail, "valid YAML", where=f"{name}:{error.problem_mark.line + 1}")
    return Problem("", one_line(str(error).splitlines()[0]), "valid YAML", where=name)


def _forbidden(events: Iterable[object], name: str) -> list[Problem]:
    """Problems of the parts of YAML that are refused, found before any value is built."""
    problems: list[Problem] = []
    depth = documents = 0

    def refuse(event: NodeEvent | DocumentStartEvent, got: str, wanted: str) -> None:
        problems.append(Problem("", got, wanted, where=f"{name}:{event.start_mark.line + 1}"))

    for event in events:
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents == 2:
                refuse(event, "a second document", "one document a file")
            if event.version not in (None, (1, 2)):
                refuse(event, "a %YAML directive of another version", "YAML 1.2")
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        elif isinstance(event, AliasEvent):
            refuse(event, f"the alias *{event.anchor}", "values written out")
        elif isinstance(event, NodeEvent):
            depth += isinstance(event, CollectionStartEvent)
            if event.anchor is not None:
                refuse(event, f"the anchor &{event.anchor}", "values written out")
            if getattr(event, "tag", None) is not None:
                refuse(event, f"the tag {event.tag}", "plain values without tags")  # type: ignore[attr-defined]
            if depth > MAX_DEPTH:
                refuse(event, f"values nested more than {MAX_DEPTH} deep", "a flat job file")
                break
    return problems


class _Builder:
    """Turns composed nodes into values, remembering lines and refusing repeated keys."""

    def __init__(self, yaml: YAML, name: str, document: YamlDocument) -> None:
        self.constructor = yaml.constructor
        self.name = name
        self.document = document

    def build(self, node: Node, path: Path) -> object:
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            return self.constructor.construct_object(node, deep=True)
        except ValueError:  # looks like a number or a date and is none, e.g. 2020-13-45
            self._refuse(path, node, shown(str(node.value)), "a value YAML can read, or a quoted string")
            return None

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, object]:
        built: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str) or not key_node.tag.endswith((":str", ":merge")):
                shown = key if isinstance(key, str) else "a list or mapping"
                self._refuse(path, key_node, f"the key {shown}", "keys that are strings; quote it")
            elif key in built:
                first = self.document.lines[(*path, key)]
                self._refuse((*path, key), key_node, f"the key a second time (first in line {first})", "each key once")
            else:
                self.document.lines[(*path, key)] = key_node.start_mark.line + 1
                built[key] = self.build(value_node, (*path, key))
        return built

    def _refuse(self, path: Path, node: Node, got: str, wanted: str) -> None:
        where = f"{self.name}:{node.start_mark.line + 1}"
        self.document.problems.append(Problem(key_of(path), got, wanted, where=where))
