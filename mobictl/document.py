# SPDX-License-Identifier: Apache-2.0
"""YAML from a stranger: plain values, the place of each one in the text, and hard limits.

A YAML reader that only gives values loses the line and column that an error should name, and one that
trusts its input can be made to eat all memory with a few nested aliases. So the text is read in three
steps: events (depth and number are limited before anything recursive runs), nodes (which know their
place), values (plain maps, lists, texts, numbers; duplicate keys and tags are refused, and the size
*after* expanding aliases is limited).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Final, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StreamMark, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from proto.problems import Path, Problem
from proto.units import shown

SIZE: Final = 1 << 20
DEPTH: Final = 16
EVENTS: Final = 100_000
ALIASES: Final = 1_000
VALUES: Final = 100_000
DIGITS: Final = 40
_TAG: Final = "tag:yaml.org,2002:"
Mark = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong in a file, at a line and column counted from 1 (0: the file as a whole)."""

    line: int
    column: int
    path: str
    message: str


class DocumentError(Exception):
    """A file that cannot be used, with everything wrong in it; `str()` is fit to be shown to a person."""

    def __init__(self, source: str, findings: list[Finding], text: str = "") -> None:
        self.source, self.findings, self.text = source, findings, text
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """`FILE:LINE:COLUMN: message`, each with the line of the file and a caret below it."""
        source = self.text.splitlines()
        shown_lines: list[str] = []
        for finding in self.findings:
            place = f"{self.source}:{finding.line}:{finding.column}" if finding.line else self.source
            shown_lines.append(f"{place}: {finding.message}")
            if 0 < finding.line <= len(source) and len(source[finding.line - 1]) <= 160:
                line = "".join(c if c.isprintable() else " " for c in source[finding.line - 1])
                shown_lines.append(f"  {finding.line:4} | {line}")
                shown_lines.append(f"       | {' ' * (finding.column - 1)}^")
        return shown_lines


@dataclass
class Document:
    """A file's plain values, and where each key and value stands (line and column from 1)."""

    source: str
    text: str
    data: Any = None
    keys: dict[Path, Mark] = field(default_factory=dict)
    values: dict[Path, Mark] = field(default_factory=dict)

    def error(self, problems: list[Problem]) -> DocumentError:
        """The problems of a validator with their places, in the order of the file."""
        found = [Finding(*self._place(p), p.where, p.message) for p in problems]
        found.sort(key=lambda finding: (finding.line, finding.column))
        return DocumentError(self.source, found, self.text)

    def _place(self, problem: Problem) -> Mark:
        path = problem.path
        table = self.keys if problem.at_key else self.values
        while path and path not in table:
            path, table = path[:-1], self.values
        return table.get(path, (1, 1))


def read_text(path: FilePath) -> str:
    """The file's text; raises DocumentError when it cannot be read, is too large or no UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE + 1)
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise DocumentError(str(path), [Finding(0, 0, "the file", reason)]) from None
    if len(raw) > SIZE:
        raise DocumentError(str(path), [Finding(0, 0, "the file", f"larger than {SIZE >> 20} MiB")])
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise DocumentError(str(path), [Finding(line, column, "the file", "not UTF-8 text")]) from None


def parse_document(text: str, source: str) -> Document:
    """YAML text → its values and their places. Raises DocumentError."""
    document = Document(source, text)
    yaml = YAML(typ="safe", pure=True)
    try:
        _check_events(document, yaml)
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        raise _yaml_error(document, error) from None
    except (YAMLError, ValueError) as error:
        message = "not YAML: " + " ".join(str(error).split())[:160]
        raise DocumentError(source, [Finding(0, 0, "the file", message)], text) from None
    if node is None:
        raise DocumentError(source, [Finding(0, 0, "the file", "the file is empty")], text)
    document.data = _Builder(document).value(node, (), ())
    return document


def _mark(mark: StreamMark | None) -> Mark:
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


def _fail(document: Document, mark: StreamMark | None, message: str, path: Path = ()) -> DocumentError:
    return DocumentError(
        document.source, [Finding(*_mark(mark), Problem(path, "").where, message)], document.text
    )


def _yaml_error(document: Document, error: MarkedYAMLError) -> DocumentError:
    mark = error.problem_mark or error.context_mark
    words = " ".join(part for part in (error.context, error.problem) if part)
    return _fail(document, mark, "not YAML: " + " ".join(words.split())[:200])


def _check_events(document: Document, yaml: YAML) -> None:
    """Refuse what is too deep or too much before anything recursive looks at it."""
    depth = aliases = documents = 0
    event: Event
    for count, event in enumerate(yaml.parse(document.text)):
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            depth += 1
            documents += depth == 1
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            depth -= 1
        elif isinstance(event, ScalarEvent) and not _printable(event.value):
            raise _fail(document, event.start_mark, "half of a surrogate pair is no text")
        aliases += isinstance(event, AliasEvent)
        if depth > DEPTH:
            raise _fail(document, event.start_mark, f"nested deeper than {DEPTH} levels")
        if count > EVENTS or aliases > ALIASES:
            raise _fail(
                document, event.start_mark, "more entries or aliases than a file of this kind can have"
            )
        if documents > 1:
            raise _fail(document, event.start_mark, "a second document begins here; a file has one")


def _printable(text: str) -> bool:
    """Whether it can be shown to anybody: an escape such as `\\ud800` makes text that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Builder:
    """Nodes → plain values, noting the places."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.left = VALUES

    def value(self, node: Node, path: Path, above: tuple[int, ...]) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _fail(self.document, node.start_mark, "the aliases of this file expand to too many values")
        if id(node) in above:
            raise _fail(self.document, node.start_mark, "this value contains itself by an alias", path)
        self.document.values.setdefault(path, _mark(node.start_mark))
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == _TAG + "map":
            return self._map(node, path, (*above, id(node)))
        if isinstance(node, SequenceNode) and tag == _TAG + "seq":
            inner = (*above, id(node))
            return [self.value(item, (*path, i), inner) for i, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and tag.startswith(_TAG):
            return self._scalar(node, tag.removeprefix(_TAG), path)
        raise _fail(self.document, node.start_mark, f"the tag {shown(tag)} is not allowed here", path)

    def _map(self, node: MappingNode, path: Path, above: tuple[int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if str(key_node.tag) == _TAG + "merge":
                merged |= self._merge(value_node, path, above)
                continue
            if not isinstance(key_node, ScalarNode):
                raise _fail(self.document, key_node.start_mark, "a key must be a simple text", path)
            key = cast(str, key_node.value)
            inner = (*path, key)
            if key in found:
                line, column = self.document.keys[inner]
                text = f"the key {shown(key)} is there twice, first at line {line}, column {column}"
                raise _fail(self.document, key_node.start_mark, text, inner)
            self.document.keys[inner] = _mark(key_node.start_mark)
            self.document.values[inner] = _mark(value_node.start_mark)
            found[key] = self.value(value_node, inner, above)
        return {**merged, **found}

    def _merge(self, node: Node, path: Path, above: tuple[int, ...]) -> dict[str, Any]:
        """`<<: *anchor`, or a list of anchors of which the first has precedence."""
        sources = node.value if isinstance(node, SequenceNode) else [node]
        found: dict[str, Any] = {}
        for source in reversed(sources):
            if not isinstance(source, MappingNode):
                raise _fail(self.document, source.start_mark, "<< takes a map, or a list of maps", path)
            found |= self.value(source, path, above)
        return found

    def _scalar(self, node: ScalarNode, kind: str, path: Path) -> Any:
        text = cast(str, node.value)
        if kind in ("int", "float") and len(text) > DIGITS:
            raise _fail(self.document, node.start_mark, f"a number with more than {DIGITS} digits", path)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() == "true"
            if kind == "int":
                return int(text.replace("_", ""), 0 if text.lstrip("+-")[:2] in ("0x", "0o") else 10)
            if kind == "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())
        except ValueError:
            raise _fail(self.document, node.start_mark, f"{shown(text)} is no number", path) from None
        if kind in ("str", "timestamp"):
            return text
        raise _fail(self.document, node.start_mark, f"the tag !!{kind} is not allowed here", path)
