"""Digests of values, of files, and of the code that decides numbers."""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def digest(value: object) -> str:
    """Short sha256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_digest(*modules: str) -> str:
    """Digest of what `modules` compute: their syntax trees without text for readers.

    Layout, comments, docstrings, progress, the text of exceptions, of log messages and of assertions do not
    count, nor do the `columns` of a task, which only tables show.

    Args:
        modules: names of modules, or of packages, which include all their modules.
    """
    total = hashlib.sha256()
    for path in sorted({path for module in modules for path in source_files(module)}):
        total.update(f"{path.relative_to(_PACKAGE).as_posix()}\n{_computation(path)}\n".encode())
    return total.hexdigest()[:16]


def source_files(module: str) -> list[Path]:
    """The files of a module or of a whole package of mochi.

    Raises:
        FileNotFoundError: there is no such module.
    """
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    if path.is_dir():
        return list(path.rglob("*.py"))
    path = path.with_suffix(".py")
    if not path.exists():
        raise FileNotFoundError(f"{module}: no such module of mochi")
    return [path]


@cache
def _computation(path: Path) -> str:
    return _text(ast.parse(path.read_bytes()))


def _text(node: object) -> str:
    """A syntax tree as text. `ast.dump` differs between Python versions: it shows fields that some lack."""
    if isinstance(node, ast.AST):
        parts = ((name, _text(value)) for name, value in _parts(node))
        shown = (f"{name}={text}" for name, text in parts if text not in ("None", "[]"))
        return f"{type(node).__name__}({', '.join(shown)})"
    if isinstance(node, list):
        return f"[{', '.join(_text(each) for each in node if not _tells(each))}]"
    return repr(node)


def _parts(node: ast.AST) -> Iterator[tuple[str, object]]:
    """The fields of a node, without text for readers."""
    for name, value in ast.iter_fields(node):
        match node, name:
            case (ast.Assert(), "msg") | (ast.Call(func=ast.Name(id="Progress")), "args" | "keywords"):
                continue
            case ast.Raise(exc=ast.Call(func=error)), "exc":
                yield name, error
            case _:
                yield name, value


def _tells(statement: object) -> bool:
    """Docstrings, `columns`, `logger.info` and the like, `warnings.warn`, `progress.advance`."""
    match statement:
        case ast.FunctionDef(name="columns") | ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
            return name in {"logger", "warnings", "progress"}
    return False
