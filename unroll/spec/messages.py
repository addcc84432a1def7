"""Pydantic's findings -> messages with places, in the words of the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from unroll.errors import SpecError, did_you_mean, quote
from unroll.spec.nodes import Entries, Items, Node, Path, Scalar, child, key_origin, node_at, place, plain

EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
SHORT = {"Tensor": "a shape, such as [n]", "Parameter": "a shape, such as [m, n]", "Number": "a number"}
BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
LENGTHS = {
    "string_too_long": "has more than {max_length:,} characters",
    "string_too_short": "is empty",
    "too_long": "has more than {max_length:,} entries",
}
BOOLS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
TAGS = ("source", "kind")  # keys that say which kind of record it is
MOST = 20  # mistakes that are told at once
Schema = Mapping[str, Any]


def to_spec_error(e: ValidationError, root: Entries, model: type[BaseModel]) -> SpecError:
    """All findings in one error, each at the value or key that is wrong."""
    errors = e.errors(include_url=False)
    paths = [place(root, error["loc"]) for error in errors]
    deeper = {path[:n] for path in paths for n in range(len(path))}
    kept = [
        (path, error)
        for path, error in zip(paths, errors, strict=True)
        if not (
            path in deeper and error["type"] in (*EXPECTED, "literal_error")
        )  # the branches of a union that the value did not mean
        and not (error["type"] == "missing" and _misspelt(path, str(error["loc"][-1]), errors, paths))
    ]
    groups: dict[object, tuple[Path, list[ErrorDetails]]] = {}
    for path, error in kept:
        groups.setdefault(_group(path, error), (path, []))[1].append(error)
    told = [_message(path, group, root, model) for path, group in list(groups.values())[:MOST]]
    if len(groups) > MOST:
        last = told.pop()
        note = f"and {len(groups) - MOST:,} more mistakes"
        told.append(SpecError(last.code, last.message, last.where, last.hint, (*last.notes, note)))
    return SpecError.together(told)


def _misspelt(parent: Path, key: str, errors: list[ErrorDetails], paths: list[Path]) -> bool:
    """Whether a key that is missing is there under an unknown name: one message is enough."""
    unknown = [path for path, error in zip(paths, errors, strict=True) if error["type"] == "extra_forbidden"]
    return any(path[:-1] == parent and did_you_mean(str(path[-1]), [key]) for path in unknown)


def _group(path: Path, error: ErrorDetails) -> object:
    """Findings of the same place are told together, but every missing key is one of its own."""
    return path, str(error["loc"][-1]) if error["type"] == "missing" else ""


def _message(path: Path, errors: list[ErrorDetails], root: Entries, model: type[BaseModel]) -> SpecError:
    for error in errors:
        context: dict[str, Any] = error.get("ctx", {})
        match error["type"]:
            case "missing":
                return _missing(path, str(error["loc"][-1]), root)
            case "union_tag_not_found":
                return _missing(path, context["discriminator"].strip("'"), root)
            case "extra_forbidden":
                return _unknown(path, root, model)
            case "union_tag_invalid":
                return _mistaken(
                    (*path, context["discriminator"].strip("'")),
                    root,
                    [],
                    re.findall(r"'(\w+)'", context["expected_tags"]),
                )
            case kind if kind in LENGTHS:
                unit = "string_too_long" if kind == "too_long" and isinstance(plain(node_at(root, path)), str) else kind
                message = f"{name(path)} {LENGTHS[unit].format(**context)}"
                return SpecError("E205", message, node_at(root, path).origin.where())
            case kind if kind in BOUNDS:
                return _out_of_bounds(path, root, *BOUNDS[kind], context)
            case kind if kind.startswith("E2"):
                place = key_origin(root, path) if error["loc"][-1] == "[key]" else node_at(root, path).origin
                return SpecError(kind, error["msg"], place.where(), context.get("hint", ""))
            case _:
                pass
    expected = [SHORT.get(e.get("ctx", {}).get("class_name", ""), EXPECTED.get(e["type"], "")) for e in errors]
    known = [e["ctx"]["expected"] for e in errors if e["type"] == "literal_error"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
    allowed = [word.strip("'") for words in known for word in re.findall(r"'\w+'|\d+", words)]
    return _mistaken(path, root, [words for words in expected if words], allowed)


def _missing(path: Path, key: str, root: Entries) -> SpecError:
    return SpecError("E202", f"{name(path)} needs a key '{key}'", key_origin(root, path).where(), f"add  {key}: ..")


def _unknown(path: Path, root: Entries, model: type[BaseModel]) -> SpecError:
    *parent, key = path
    known = known_keys(model, root, tuple(parent))
    elsewhere = [".".join(where) for where in known_paths(model) if where[-1] == key and where != path]
    hint = did_you_mean(str(key), known) or (f"it goes to {elsewhere[0]}" if elsewhere else "")
    message = f"unknown key '{quote(str(key))}' in {name(tuple(parent))}"
    return SpecError("E201", message, key_origin(root, path).where(), hint, (f"it takes: {', '.join(known)}",))


def _out_of_bounds(path: Path, root: Entries, words: str, limit: str, context: Mapping[str, Any]) -> SpecError:
    node = node_at(root, path)
    message = f"{name(path)} must be {words} {context[limit]:g}, not {_shown(node)}"
    return SpecError("E205", message, node.origin.where())


def _mistaken(path: Path, root: Entries, expected: list[str], allowed: list[str]) -> SpecError:
    """A value of the wrong type (E203), or a word that is not one of those allowed (E204)."""
    node = node_at(root, path)
    value = node.value if isinstance(node, Scalar) else None
    choices = [*dict.fromkeys(expected), *(word if word.isdecimal() else f"'{word}'" for word in allowed)]
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0] if choices else "valid"
    code = "E204" if allowed and isinstance(value, str) else "E203"
    hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
    if isinstance(value, str) and value.lower() in BOOLS and "true or false" in expected:
        hint = f"write {BOOLS[value.lower()]}"
    elif "text" in expected and not isinstance(node, Scalar):
        hint = "a formula that starts with [ or { goes in double quotes"
    elif isinstance(value, str) and re.fullmatch(r"[\d_]+", value) and "a whole number" in expected:
        hint = f"write {value.replace('_', '')}"
    return SpecError(code, f"{name(path)} must be {listed}, not {_shown(node)}", node.origin.where(), hint)


def _shown(node: Node) -> str:
    match node:
        case Scalar(None, _):
            return "empty"
        case Scalar(bool(value), _):
            return str(value).lower()
        case Scalar(str(value), _):
            return f"'{quote(value, 40)}'"
        case Scalar(value, _):
            return str(value)
        case Items():
            return "a list"
        case Entries():
            return "a mapping"


def name(path: Path) -> str:
    """A place in words: unroll.learn.theta."""
    return quote(".".join(map(str, path))) if path else "a spec"


# --- what the schema allows, read off its JSON form ----------------------------------------------------------------


@cache
def _schema(model: type[BaseModel]) -> Schema:
    return model.model_json_schema()


def known_keys(model: type[BaseModel], root: Entries, path: Path) -> list[str]:
    """The keys that the schema has at `path`; of several kinds of record, those of the one that is written."""
    schema = _schema(model)
    found = [schema]
    for key in path:
        found = [below for part in found for option in _options(part, schema) for below in _below(option, key)]
    written = node_at(root, path)
    options = [option.get("properties", {}) for part in found for option in _options(part, schema)]
    fitting = [keys for keys in options if any(_is(keys.get(tag, {}), child(written, tag)) for tag in TAGS)]
    return sorted({key for keys in fitting or options for key in keys})


def _is(part: Schema, tag: Node | None) -> bool:
    """Whether the tag that is written is one that this kind of record has."""
    return isinstance(tag, Scalar) and tag.value in [part[k] for k in ("const",) if k in part] + [*part.get("enum", ())]


def known_paths(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """(section, key) of every key one level down: where a key may belong that stands in the wrong place."""
    schema = _schema(model)
    for section, part in cast(Schema, schema["properties"]).items():
        for option in _options(part, schema):
            yield from ((section, key) for key in option.get("properties", {}))


def _options(part: Schema, schema: Schema) -> Iterator[Schema]:
    if "$ref" in part:
        yield from _options(schema["$defs"][part["$ref"].rsplit("/", 1)[1]], schema)
    elif options := cast("Iterable[Schema]", part.get("anyOf") or part.get("oneOf") or ()):
        for option in options:
            yield from _options(option, schema)
    else:
        yield part


def _below(part: Schema, key: str | int) -> Iterator[Schema]:
    if key in part.get("properties", {}):
        yield part["properties"][key]
    for rest in ("items", "additionalProperties"):
        if isinstance(part.get(rest), dict):
            yield part[rest]
