"""Read YAML files strictly and explain mistakes: file, key path, what was found, what is allowed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from mochi.config.sections import Section
from mochi.errors import DataError, UserError, guess
from mochi.text import read_text


class ConfigError(UserError):
    """A mistake in an experiment or run file."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def read_value(text: str) -> Any:
    """A value as written in a file: a number, a list, a word."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file.

    Raises:
        ConfigError: it does not exist, is not readable, is not YAML, or is not a mapping.
    """
    try:
        data = yaml.load(read_text(path, "a YAML file"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except DataError as error:
        raise ConfigError(str(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {type(data).__name__}; expected keys and values")
    return data


def validate(
    kind: Any,
    data: Mapping[str, Any],
    origin: str,
    rename: Mapping[str, str] | None = None,
) -> Any:
    """`data` as a `kind`.

    Args:
        kind: a section, or a union of sections.
        data: keys and values.
        origin: where they come from, for messages.
        rename: top-level key -> where it was written, if elsewhere.

    Raises:
        ConfigError: one line per mistake.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(data))
    except ValidationError as error:
        lines = []
        for mistake in error.errors():
            keys, body = _explain(dict(mistake), _sections(kind), data)
            where = ".".join([(rename or {}).get(keys[0], keys[0]), *keys[1:]]) if keys else "(top level)"
            lines.append(f"{origin}: {where}: {body}")
        raise ConfigError("\n".join(lines)) from None


def _explain(mistake: dict[str, Any], roots: list[type[Section]], data: object) -> tuple[list[str], str]:
    """The key path of a mistake, and what was found and what is allowed there."""
    keys, siblings = _locate(mistake["loc"], roots, data)
    found, text = mistake["input"], mistake["msg"].removeprefix("Value error, ")
    match mistake["type"]:
        case "extra_forbidden":
            return keys, unknown_key(keys[-1], siblings)
        case "missing" | "union_tag_not_found":
            if mistake["type"] == "union_tag_not_found":
                keys = [*keys, mistake["ctx"]["discriminator"].strip("'")]
            return keys, "missing; this key is required"
        case "union_tag_invalid":
            context = mistake["ctx"]
            allowed = re.findall(r"'([^']+)'", context["expected_tags"])
            return [*keys, context["discriminator"].strip("'")], guess(context["tag"], allowed)
        case "value_error":
            # Cross-field rules name the key and the values themselves.
            return keys, text
        case _:
            shown = repr(found) if len(repr(found)) < 80 else type(found).__name__
            return keys, f"found {shown}; allowed: {text.removeprefix('Input should be ')}"


def _locate(
    location: tuple[int | str, ...], roots: list[type[Section]], data: object
) -> tuple[list[str], list[str]]:
    """The keys of a location in `data` without the names of union members, and the keys allowed there."""
    keys: list[str] = []
    models = siblings_from = roots
    for step in location:
        part = str(step)
        inside = [
            section
            for model in models
            if part in model.model_fields
            for section in _sections(model.model_fields[part].annotation)
        ]
        chosen = [model for model in models if part in _tags(model)]
        if chosen and not inside:
            models = chosen
            continue
        keys.append(part)
        data = data.get(step) if isinstance(data, Mapping) else None
        known = any(part in model.model_fields for model in models)
        # What is not a field is a user's name, such as a detection set's, or the mistake itself.
        own = [section for model in models if (section := model.section_of(part, data))]
        siblings_from, models = models, inside if known else own or models
    return keys, sorted({name for model in siblings_from for name in model.model_fields})


def _sections(annotation: object) -> list[type[Section]]:
    """The sections that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _tags(model: type[Section]) -> set[str]:
    """The names by which a section is chosen from a union: its only allowed source or objective."""
    fields = (model.model_fields.get(name) for name in ("source", "objective"))
    return {tag for field in fields if field for tag in get_args(field.annotation)}


def unknown_key(key: str, allowed: list[str]) -> str:
    """The message on a key that does not exist, with a guess at the intended one."""
    return f"unknown key {guess(key, allowed).removeprefix('found ')}"
