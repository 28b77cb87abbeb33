# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a structured document, where, and what was probably meant.

A validator knows paths (`topology`, `nodes`, `content`, `memory`), a person knows lines and columns; a
`Problem` is the message with its path, so that the holder of the text can add the position.
`from_pydantic` turns pydantic's findings into sentences of ours: which key is unknown and which one is
nearest to it, which one is missing, what kind of value was expected.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from proto.units import shown

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong. `at_key` says that the key itself is the offence, not the value it has."""

    path: Path
    message: str
    at_key: bool = False

    @property
    def where(self) -> str:
        """`topology.nodes.content.memory`, `links[2]`; `the file` for the whole."""
        text = ""
        for step in self.path:
            text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
        return text[:120] or "the file"


def nearest(name: object, candidates: Iterable[str]) -> str | None:
    """The candidate most like a name that does not exist, or None if none is near."""
    found = difflib.get_close_matches(str(name)[:80].lower(), list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def suggestion(name: object, candidates: Collection[str], what: str = "") -> str:
    """`; did you mean 'memory'?`, or the list of what there is when nothing is near and the list is short."""
    near = nearest(name, candidates)
    if near is not None:
        return f"; did you mean {near!r}?"
    if candidates and len(candidates) <= 12:
        return (
            f"; {what or 'there'} {'is' if len(candidates) == 1 else 'are'} {', '.join(sorted(candidates))}"
        )
    return ""


_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a map of keys and values",
    "model_type": "a map of keys and values",
    "model_attributes_type": "a map of keys and values",
}


def _counted(context: Mapping[str, Any], bound: str) -> str:
    number = context[bound]
    return f"{number} {'entry' if number == 1 else 'entries'}, not {context['actual_length']}"


_WORDS: dict[str, Callable[[ErrorDetails, Mapping[str, Any]], str]] = {
    "value_error": lambda error, context: str(context["error"]),
    "literal_error": lambda error, context: f"expected {context['expected']}, not {shown(error['input'])}",
    "too_short": lambda error, context: "expected at least " + _counted(context, "min_length"),
    "too_long": lambda error, context: "expected at most " + _counted(context, "max_length"),
    "string_too_short": lambda error, context: "expected a text that is not empty",
    "string_too_long": lambda error, context: f"longer than {context['max_length']} characters",
    "string_pattern_mismatch": lambda error, context: (
        f"{shown(error['input'])} has a character that is not allowed"
    ),
    "greater_than_equal": lambda error, context: (
        f"expected at least {context['ge']}, not {shown(error['input'])}"
    ),
    "less_than_equal": lambda error, context: (
        f"expected at most {context['le']}, not {shown(error['input'])}"
    ),
}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation like `dict[str, Node] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models_in(get_args(annotation)[0])
    if origin in (dict, list, tuple, Union, types.UnionType):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    return {f.alias or name: f.annotation for name, f in model.model_fields.items()}


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model that describes the map at `path`."""
    current: type[BaseModel] | None = model
    for step in path:
        keys = _keys(current) if current is not None else {}
        if step in keys:
            models = _models_in(keys[str(step)])
            current = models[0] if models else None
    return current


def from_pydantic(
    error: ValidationError, model: type[BaseModel], *, later: Collection[str] = ()
) -> list[Problem]:
    """Every finding of pydantic about `model`, in our words; keys in `later` are "not supported yet"."""
    return [_problem(detail, model, later) for detail in error.errors(include_url=False)]


def _problem(detail: ErrorDetails, model: type[BaseModel], later: Collection[str]) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    path: Path = tuple(step for step in detail["loc"] if step != "[key]")
    if len(path) != len(detail["loc"]):
        inner = _WORDS.get(kind)
        return Problem(
            path, inner(detail, context) if inner else f"{shown(path[-1])} is not a name", at_key=True
        )
    if kind == "extra_forbidden":
        key = path[-1]
        if key in later:
            return Problem(path, f"{key!r} is not supported yet", at_key=True)
        owner = _model_at(model, path[:-1])
        hint = suggestion(key, list(_keys(owner)), "the keys here") if owner is not None else ""
        return Problem(path, f"unknown key {shown(key)}{hint}", at_key=True)
    if kind == "missing":
        return Problem(path[:-1], f"the key {path[-1]!r} is missing")
    if kind in _EXPECTED:
        return Problem(path, f"expected {_EXPECTED[kind]}, not {shown(detail['input'])}")
    words = _WORDS.get(kind)
    return Problem(path, words(detail, context) if words else detail["msg"].lower())
