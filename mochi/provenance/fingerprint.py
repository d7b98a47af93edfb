"""Digests of values, of files, and of the code that decides numbers."""

import ast
import hashlib
import json
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
    return _text(_WithoutMessages().visit(ast.parse(path.read_bytes())))


class _WithoutMessages(ast.NodeTransformer):
    """Removes text for readers and keeps computations."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None  # a docstring
        if isinstance(node.value, ast.Call) and _only_tells(node.value.func):
            return None
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return None if node.name == "columns" else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "Progress":
            node.args, node.keywords = [], []
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)


def _only_tells(function: ast.expr) -> bool:
    """`logger.info` and the like, `warnings.warn`, `progress.advance`."""
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id in {"logger", "warnings", "progress"}
    )


def _text(node: object) -> str:
    """A syntax tree as text. `ast.dump` differs between Python versions: it shows fields that some lack."""
    if isinstance(node, ast.AST):
        shown = ((name, _text(value)) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(f'{name}={text}' for name, text in shown)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_text, node))}]"
    return repr(node)
