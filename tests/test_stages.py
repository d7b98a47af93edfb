"""Every module that a stage imports is either in its table, as it decides numbers, or is known not to."""

import ast
from functools import cache
from pathlib import Path

import pytest

from mochi.config import task_names
from mochi.stages import STAGES, UNTRAINED, numbers_of_task, stage_of

ROOT = Path(__file__).parents[1]

START = {
    "prepare": [
        "mochi.data.ingest.prepare",
        *(f"mochi.data.ingest.sources.{path.stem}" for path in ROOT.glob("mochi/data/ingest/sources/*.py")),
    ],
    "scenes": ["mochi.detection.scenes"],
    "pretrain": [
        "mochi.pretraining.stage",
        *(f"mochi.contrast.rules.{path.stem}" for path in ROOT.glob("mochi/contrast/rules/*.py")),
    ],
    **{
        f"evaluate {task}": ["mochi.evaluation.stage", f"mochi.evaluation.tasks.{task}"]
        for task in task_names()
    },
    "search": ["mochi.detection.stage"],
    "detect": ["mochi.detection.stage"],
    "analyze": ["mochi.analysis.stage"],
    "report": ["mochi.report.stage"],
}
"""The entry module of each stage, and the modules that it looks up by name while it runs."""

NUMBERS = {name: stage.numbers for name, stage in STAGES.items() if name != "evaluate"} | {
    f"evaluate {task}": numbers_of_task(task) for task in task_names()
}

NO_NUMBERS = {
    "mochi.config": "reaches a stage as its settings, which have a digest of their own",
    "mochi.errors": "messages",
    "mochi.extras": "messages",
    "mochi.layout": "paths of files",
    "mochi.stages": "this table",
    "mochi.provenance": "what made a result",
    "mochi.data.ingest.sniff": "refuses files",
    "mochi.text": "values of files, which are inputs, unchanged",
    "mochi.storage": "how files are written, and where a killed run goes on",
    "mochi.encoders.files": "tensors of a file, which is an input, unchanged",
    "mochi.evaluation.feature_files": "the same features, read again",
    "mochi.evaluation.notes": "tells",
    "mochi.evaluation.resume": "where a killed run goes on",
    "mochi.evaluation.stage": "from a file to a file; the task computes",
    "mochi.pretraining.stage": "from a file to a file; the loop computes",
    "mochi.runtime.gpus": "which GPU",
    "mochi.runtime.launch": "which processes",
    "mochi.runtime.limits": "refuses what the host cannot do",
    "mochi.runtime.job_status": "tells",
    "mochi.runtime.locks": "who waits",
    "mochi.runtime.monitoring": "stops, and tells",
    "mochi.runtime.progress": "tells",
    "mochi.runtime.shared_memory": "how many processes load",
    "mochi.runtime.shares": "threads and workers of a run",
    "mochi.runtime.tensorboard": "tells",
    "mochi.runtime.watchdog": "ends a run that hangs",
}

_FINE_TUNING = {
    "mochi.detection.check_images": "refuses images",
    "mochi.detection.figures": "pictures",
    "mochi.data.ingest.classes": "warns",
    "mochi.data.ingest.files": "finds the images that are named",
    "mochi.data.format": "the mark of images without a label",
    "mochi.data.ingest.raw": "paths of the images that are checked",
    "mochi.data.ingest.validate": "checks images",
}
NO_NUMBERS_OF_ONE_STAGE = {
    "scenes": {"mochi.data.ingest.files": "finds the images that are named"},
    "search": _FINE_TUNING,
    "detect": _FINE_TUNING,
    "pretrain": {
        f"mochi.contrast.rules.{path.stem}": "counts in the rows that name it (PretrainRun.code)"
        for path in ROOT.glob("mochi/contrast/rules/*.py")
        if path.stem not in {"__init__", "moco"}
    },
}


def source(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def only_for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


@cache
def imports(name: str) -> set[str]:
    """The modules of mochi that a module imports, anywhere in it, and the packages around it.

    Imports for type checkers only do not count, and the configuration imports only the settings of rules.
    """
    found = {name.rpartition(".")[0]} - {""}
    tree = ast.parse(source(name).read_bytes())
    tree.body = [each for each in tree.body if not only_for_types(each)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    if name.startswith("mochi.config."):
        found = {each for each in found if not each.startswith("mochi.contrast")}
    return {each for each in found if each.split(".")[0] == "mochi" and source(each).exists()}


def imported(*names: str) -> set[str]:
    """These modules and everything they import, directly or not; a package by its `__init__`."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports(name)
    return {f"{name}.__init__" if source(name).name == "__init__.py" else name for name in seen}


def computes(name: str) -> bool:
    """Whether a module has more than a docstring and imports."""
    statements = ast.parse(source(name.removesuffix(".__init__")).read_bytes()).body
    return any(not isinstance(each, ast.Expr | ast.Import | ast.ImportFrom) for each in statements)


def covered(name: str, entries: object) -> bool:
    assert isinstance(entries, tuple | dict)
    return any(name == entry or name.startswith(f"{entry}.") for entry in entries)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_module_of_a_stage_is_accounted_for(name: str) -> None:
    harmless = NO_NUMBERS | {"mochi.__init__": "names"} | NO_NUMBERS_OF_ONE_STAGE.get(name, {})
    unknown = {
        module
        for module in imported(*START[name])
        if computes(module) and not covered(module, NUMBERS[name]) and not covered(module, harmless)
    }
    assert not unknown, (
        f"{name} imports {sorted(unknown)}: add each to the `numbers` of the stage in mochi/stages.py, or, "
        "if it decides no number, to NO_NUMBERS here"
    )


@pytest.mark.parametrize("name", NUMBERS)
def test_no_module_is_listed_that_the_stage_does_not_import(name: str) -> None:
    """Otherwise its results would be computed again for nothing."""
    modules = imported(*START[name])
    idle = [entry for entry in NUMBERS[name] if not any(covered(each, (entry,)) for each in modules)]
    assert not idle


def test_the_weights_of_an_untrained_encoder_are_accounted_for() -> None:
    modules = {module for module in imported("mochi.encoders") if computes(module)}
    assert {module for module in modules if not covered(module, NO_NUMBERS)} - {"mochi.__init__"} == set(
        UNTRAINED
    )


def test_no_exception_is_unused() -> None:
    everything = {name: imported(*START[name]) for name in NUMBERS}
    for entry in NO_NUMBERS:
        assert any(covered(module, (entry,)) for modules in everything.values() for module in modules), (
            entry
        )
    for name, entries in NO_NUMBERS_OF_ONE_STAGE.items():
        for entry in entries:
            assert any(covered(module, (entry,)) for module in everything[name]), entry


def test_no_module_is_in_both_lists() -> None:
    for name, numbers in NUMBERS.items():
        harmless = NO_NUMBERS | NO_NUMBERS_OF_ONE_STAGE.get(name, {})
        assert not [entry for entry in numbers if covered(entry, harmless)]


def test_every_evaluation_has_a_stage() -> None:
    assert stage_of("labels-1") == "evaluate"
    assert stage_of("detection-voc") == "detect"
