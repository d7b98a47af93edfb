"""Digests of code, so that a changed formula re-runs what it touches and a changed comment nothing; and of
files.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

# The module that a stage of the workflow starts in.
STAGE_MODULES = {
    "prepare": "mochi.data.ingest.prepare",
    "pretrain": "mochi.pretraining.stage",
    "linear": "mochi.evaluation.linear",
    "knn": "mochi.evaluation.knn",
    "scenes": "mochi.detection.scenes",
    "detection": "mochi.detection.stage",
    "tables": "mochi.report.tables",
    "figures": "mochi.report.figures",
}


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_digests() -> dict[str, str]:
    """Stage of the workflow -> digest of its code."""
    return {stage: code_digest(module) for stage, module in STAGE_MODULES.items()}


def code_digest(*modules: str) -> str:
    """Digest of what `modules` execute: their syntax trees and those of all of mochi they import.

    Comments, docstrings and layout do not count; a changed formula does. Neither does `mochi.config`:
    what it says reaches a stage as its settings, whose digest stands beside this one. Example:
    `code_digest("mochi.pretraining.stage")`.
    """
    total = hashlib.sha256()
    counted = (name for name in imported_modules(*modules) if not name.startswith("mochi.config"))
    for name in sorted(counted):
        total.update(f"{name}\n{_executed_text(_source_of(name))}\n".encode())
    return total.hexdigest()[:16]


def imported_modules(*modules: str) -> set[str]:
    """The modules of mochi that `modules` import, directly or not, themselves included."""
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += _imports(name)
    return seen


@cache
def _imports(name: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(_source_of(name).read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [each for each in names if each.split(".")[0] == "mochi" and _source_of(each).exists()]
    return found


def _source_of(name: str) -> Path:
    path = _PACKAGE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _executed_text(path: Path) -> str:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [child for child in body if not _is_docstring(child)]  # type: ignore[attr-defined]
    return _text(tree)


def _text(node: object) -> str:
    """A syntax tree as text that is the same on every Python: `ast.dump` shows the fields that a version
    has added, empty ones too.
    """
    if isinstance(node, ast.AST):
        shown = ((name, _text(value)) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(f'{name}={text}' for name, text in shown)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_text, node))}]"
    return repr(node)


def _is_docstring(node: ast.AST) -> bool:
    """A bare string: the docstring of a module, class, function or field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
