"""Write the reference pages from the code: every key of an experiment file, every command."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mochi.config.schema import schema

_ROOT = Path(__file__).resolve().parents[1]

_INTRODUCTION = """# Configuration reference

An experiment file (`config/*.yaml`) describes one table of results. Keys without a default are mandatory,
except in `pretrain` and `methods`, which are merged: the keys of a method replace those of `pretrain`.
Unknown keys, wrong types and values that do not fit together are errors; `mochi check CONFIG` lists them.

`mochi schema > config.schema.json` writes the same as a JSON Schema. Editors with the YAML language server
then complete and check keys in a file with this first line:

```yaml
# yaml-language-server: $schema=config.schema.json
```
"""


def write(folder: Path) -> None:
    """Write `configuration.md` and `commands.md` into `folder`; unchanged files keep their dates."""
    folder.mkdir(exist_ok=True)
    for name, text in {"configuration.md": configuration(), "commands.md": commands()}.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def configuration() -> str:
    """All sections of an experiment file, each after the first section that refers to it."""
    whole = schema()
    sections, queue = {}, ["Experiment"]
    while queue:
        name = queue.pop(0)
        if name not in sections:
            sections[name] = whole if name == "Experiment" else whole["$defs"][name]
            queue += re.findall(r'"#/\$defs/(\w+)"', json.dumps(sections[name]["properties"]))
    return "\n".join((_INTRODUCTION, *(_section(name, section) for name, section in sections.items())))


def _section(name: str, section: dict[str, Any]) -> str:
    rows = [
        (
            f"`{key}`",
            _type(value),
            f"`{json.dumps(value['default'])}`" if "default" in value else "",
            " ".join(value.get("description", "").split()),
        )
        for key, value in section["properties"].items()
    ]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    about = section.get("description", "")
    return f"## {name}\n\n{about}\n\n| key | type | default | |\n| --- | --- | --- | --- |\n{table}\n"


def _type(value: dict[str, Any]) -> str:
    """The type of a key in words."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(map(_type, value[union]))
    if "enum" in value or "const" in value:
        return " | ".join(f"`{each}`" for each in value.get("enum", [value.get("const")]))
    prefix = value.get("pattern", "").removeprefix("^")
    kind = value.get("type", f"`{prefix}NAME`")
    if kind == "array":
        return f"list of {_type(value['items'])}" if "items" in value else "list"
    if kind == "object":
        named = [value.get("additionalProperties"), *value.get("patternProperties", {}).values()]
        inner = next((each for each in named if isinstance(each, dict)), None)
        return f"by name: {_type(inner)}" if inner else "keys"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {value[name]:g}" for name, sign in signs.items() if name in value]
    return " ".join((kind, *limits))


def commands() -> str:
    """Every command with its help, by Typer's own generator."""
    command = [sys.executable, "-m", "typer", "mochi.cli", "utils", "docs", "--name", "mochi"]
    done = subprocess.run(
        [*command, "--title", "Commands"], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout
