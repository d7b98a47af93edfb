"""A code digest changes with what the code computes, not with comments, docstrings and messages."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from mochi.provenance import fingerprint

FORMULA = '''"""Doc."""

import logging

from mochi.runtime.progress import Progress

logger = logging.getLogger(__name__)
SCALE = 2


def f(x, mode="mean"):
    """Doc."""
    assert x >= 0, f"negative: {x}"
    if mode not in ("mean", "sum"):
        raise ValueError(f"mode: found {mode!r}; expected mean or sum")
    if x > 100:
        logger.warning("large: %s", x)
    with Progress("halving", total=3) as progress:
        progress.advance("slow")
        return SCALE * x + 1
'''


def digest(folder: Path, *modules: str, **files: str) -> str:
    """The digest of `modules` in a package of these files, computed by a copy of the program in it."""
    files = {"__init__": "", "formula": FORMULA, "other": "y = 1\n", **files}
    package = folder / "mochi"
    (package / "provenance").mkdir(parents=True)
    (package / "parts").mkdir()
    for name, text in files.items():
        (package / f"{name.replace('parts_', 'parts/')}.py").write_text(text)
    copy = shutil.copy(fingerprint.__file__, package / "provenance")
    spec = importlib.util.spec_from_file_location("copied_fingerprint", copy)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    found: str = program.code_digest(*modules)
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Doc."""\n\nimport', '"""Another."""\n\nimport'),
        ('    """Doc."""\n', "    '''Another, of\n    several lines.'''\n"),
        ('    """Doc."""\n', ""),
        ("SCALE = 2", "# of the result\nSCALE = 2  # not 3"),
        ("SCALE = 2", "SCALE = 2\n\n\n"),
        ("SCALE * x + 1", "(SCALE * x) + 1"),
        ('f"negative: {x}"', '"must not be negative"'),
        (', f"negative: {x}"', ""),
        ('f"mode: found {mode!r}; expected mean or sum"', '"unknown mode", mode'),
        ('"large: %s", x', '"x = %s is large", x'),
        ("logger.warning", "logger.info"),
        ('Progress("halving", total=3)', 'Progress("halves", total=4)'),
        ('progress.advance("slow")', "progress.advance()"),
        ("\ndef f(", '\ndef columns():\n    return {"top1": "top-1"}\n\n\ndef f('),
    ],
)
def test_comments_docstrings_and_messages_do_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in FORMULA
    before = digest(tmp_path / "before", "mochi.formula")
    assert digest(tmp_path / "after", "mochi.formula", formula=FORMULA.replace(old, new, 1)) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SCALE = 2", "SCALE = 3"),
        ("SCALE = 2", "SCALE = 2.0"),
        ("SCALE * x", "SCALE / x"),
        ("x >= 0", "x > 0"),
        ('mode="mean"', 'mode="sum"'),
        ('("mean", "sum")', '("mean", "max")'),
        ("x > 100", "x >= 100"),
        ("raise ValueError", "raise TypeError"),
        ("SCALE * x + 1\n", "SCALE * x + 1\n\n\ndef g(x):\n    return x\n"),
        ("SCALE * x + 1", "SCALE * (x + 1)"),
    ],
)
def test_computations_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in FORMULA
    before = digest(tmp_path / "before", "mochi.formula")
    assert digest(tmp_path / "after", "mochi.formula", formula=FORMULA.replace(old, new, 1)) != before


def test_only_the_named_modules_count(tmp_path: Path) -> None:
    before = digest(tmp_path / "before", "mochi.formula")
    assert digest(tmp_path / "edited", "mochi.formula", other="y = 2\n") == before
    assert digest(tmp_path / "both", "mochi.formula", "mochi.other") != before


def test_the_location_and_the_order_of_modules_do_not_count(tmp_path: Path) -> None:
    before = digest(tmp_path / "before", "mochi.formula", "mochi.other")
    assert digest(tmp_path / "else where", "mochi.other", "mochi.formula", "mochi.other") == before


def test_a_package_stands_for_its_modules(tmp_path: Path) -> None:
    files = {"parts___init__": "", "parts_a": "a = 1\n", "parts_b": "b = 1\n"}
    before = digest(tmp_path / "before", "mochi.parts", **files)
    named = [f"mochi.parts.{name}" for name in ("__init__", "a", "b")]
    assert digest(tmp_path / "named", *named, **files) == before
    changes: list[dict[str, str]] = [{"parts_a": "a = 2\n"}, {"parts_c": "c = 1\n"}, {"parts_b": ""}]
    found = {
        digest(tmp_path / str(index), "mochi.parts", **(files | change))
        for index, change in enumerate(changes)
    }
    assert len(found - {before}) == 3
    renamed = {"parts___init__": "", "parts_a": "a = 1\n", "parts_z": "b = 1\n"}
    assert digest(tmp_path / "renamed", "mochi.parts", **renamed) not in {before, *found}


def test_a_module_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mochi\.nothing: no such module of mochi"):
        digest(tmp_path, "mochi.formula", "mochi.nothing")


def test_a_digest_does_not_depend_on_the_version_of_python(tmp_path: Path) -> None:
    """Python 3.12 added a field to functions, and `ast.dump` of 3.13 shows no empty lists.

    The digest was the same on 3.11, 3.12 and 3.13. If you change how it is computed, every result is stale.
    """
    formula = "def f(x):\n    return -x or None\n"
    assert digest(tmp_path, "mochi.formula", formula=formula) == "1232f41d7514a26f"


def test_every_logger_has_a_name_that_is_recognised() -> None:
    """Otherwise its messages count as computation."""
    for path in fingerprint.source_files("mochi"):
        for line in path.read_text().splitlines():
            if "= logging.getLogger(" in line:
                assert line.startswith("logger = "), f"{path}: {line}"


def test_digests_of_values_and_files(tmp_path: Path) -> None:
    assert fingerprint.digest({"a": 1, "b": [2.5]}) == fingerprint.digest({"b": [2.5], "a": 1})
    assert fingerprint.digest({"a": 1}) != fingerprint.digest({"a": 1.5})
    file = tmp_path / "file"
    file.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert fingerprint.file_digest(file).startswith("ba7816bf8f01cfea414140de5dae2223")
