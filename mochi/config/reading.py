"""Read YAML files strictly and explain mistakes: file, key path, what was found, what is allowed."""

import os
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

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                text = f"the key {key.value!r} is written twice"
                raise yaml.composer.ComposerError(None, None, text, key.start_mark)
            seen.add(str(key.value))
        return node


def read_value(text: str, origin: str) -> Any:
    """A value as written in a file: a number, a list, a word.

    Raises:
        ConfigError: it is not YAML; the message names `origin`.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split()).replace(' in "<unicode string>"', "")
    except RecursionError:
        reason = "nested too deeply"
    except (ValueError, LookupError, AttributeError) as error:
        reason = f"a date, a number or a tag: {error}"  # PyYAML's constructors of 2001-99-99, !!int x
    raise ConfigError(f"{origin}: is not valid YAML: {reason}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file.

    Raises:
        ConfigError: it does not exist, is not readable, is not YAML, or is not a mapping.
    """
    if not os.path.lexists(path):
        raise ConfigError(
            f"{path}: no such file; name an experiment file, or run the command in the project's folder"
        )
    try:
        text = read_text(path, "a YAML file")
    except DataError as error:
        raise ConfigError(str(error)) from None
    data = read_value(text, str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{path}: found {found}; expected keys and values")
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
            if mistake["type"] == "invalid_key" or keys[-1:] == ["[key]"]:
                above = keys[: -2 if keys[-1] == "[key]" else -1]
                return above, f"found the key {found!r}; allowed: text; write it in quotes"
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
