"""A code digest changes with what the code does, and with nothing else."""

import ast
from pathlib import Path

import pytest

from mochi.provenance import fingerprint as code


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of three modules: stage -> formula, and a stranger."""
    root = tmp_path / "mochi"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "formula.py").write_text('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    (root / "stage.py").write_text("from mochi.formula import f\n\nprint(f(1))\n")
    (root / "stranger.py").write_text("y = 1\n")
    monkeypatch.setattr(code, "_PACKAGE", root)
    return root


def digest() -> str:
    code._imports.cache_clear()
    code._executed_text.cache_clear()
    return code.code_digest("mochi.stage")


@pytest.mark.parametrize(
    ("file", "text", "changes"),
    [
        ("formula.py", '"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 2\n', True),
        ("formula.py", '"""New."""\n\n# why\ndef f(x):\n    """New."""\n\n    return  x + 1\n', False),
        ("stage.py", "from mochi.formula import f\n\nprint(f(2))\n", True),
        ("stranger.py", "y = 2\n", False),
    ],
)
def test_what_changes_a_digest(package: Path, file: str, text: str, changes: bool) -> None:
    before = digest()
    (package / file).write_text(text)
    assert (digest() != before) is changes


def test_a_stage_depends_on_what_it_imports() -> None:
    code._imports.cache_clear()
    pretrain = code.imported_modules("mochi.pretraining.stage")
    assert {"mochi.contrast.loss", "mochi.contrast.negatives", "mochi.data.views.augment"} <= pretrain
    assert not any(name.startswith(("mochi.evaluation", "mochi.report", "mochi.cli")) for name in pretrain)
    assert "mochi.contrast.loss" not in code.imported_modules("mochi.evaluation.knn")


def test_the_text_of_a_tree_is_the_same_on_every_python() -> None:
    """Python 3.12 added `type_params` to functions; `ast.dump` of 3.13 leaves empty lists out."""
    tree = ast.parse("def f(x):\n    return -x or None\n")
    assert code._text(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x')]), "
        "body=[Return(value=BoolOp(op=Or(), values=[UnaryOp(op=USub(), operand=Name(id='x', ctx=Load())), "
        "Constant()]))])])"
    )
