"""docs/extending.md followed literally: its files and its lines in an experiment, and nothing else."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np

from tests.project import CONFIG, ROOT, Project
from tests.tiny import FILE, TINY

PAGE = (ROOT / "docs/extending.md").read_text()


def block(language: str, containing: str) -> str:
    """The code block of the page that contains a text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = (each for each in blocks if containing in each)
    return str(found)


def test_a_new_evaluation_is_one_file_and_one_line(finished: Project, tmp_path: Path) -> None:
    code = block("python", "class NearestMean(Task)")
    assert len(code.splitlines()) < 30
    project = finished.copy(tmp_path / "project")
    (project.folder / "mochi/evaluation/tasks/nearest_mean.py").write_text(code)
    entries = block("yaml", "nearest_mean").removeprefix("evaluation:\n")
    project.edit(CONFIG, "evaluation:\n", f"evaluation:\n{entries}")
    assert project.jobs() == {"evaluate": 2 * 3, "report": 1}, "no existing result is computed again"
    for task in ("nearest-mean", "centered"):
        project.mochi("evaluate", task, "--method", "random-init", "--seed", "0")
    folder = project.folder / "results/tiny/evaluations/random-init/seed0"
    metrics, centered = (
        json.loads((folder / task / "metrics.json").read_text()) for task in ("nearest-mean", "centered")
    )
    assert 12.5 < metrics["top1"] < 100, "far above chance, 6.25%"
    assert centered["top1"] != metrics["top1"]
    assert (folder / "centered/confusion.csv").read_text().count("\n") > 16
    assert project.jobs() == {"evaluate": 2 * 2, "report": 1}
    assert not (project.folder / "work").exists(), "the shared features are removed"
    project.edit(CONFIG, "center: true", "centre: true")
    output = project.run("python", "-m", "mochi", "check").stderr
    assert "evaluation.centered.centre: unknown key 'centre'; did you mean 'center'?" in output


def test_a_new_rule_of_negatives_is_one_file_and_one_line(finished: Project, tmp_path: Path) -> None:
    code = block("python", "class Hardest(Rule)")
    assert len(code.splitlines()) < 30
    project = finished.copy(tmp_path / "project")
    (project.folder / "mochi/contrast/rules/hardest.py").write_text(code)
    row = block("yaml", "rule: hardest").replace("num_hardest: 32", "num_hardest: 32, warmup_epochs: 1")
    project.edit(CONFIG, "methods:\n", f"methods:\n  {row}")
    new = {"pretrain": 1, "analyze": 1, "evaluate": 2, "report": 1}
    assert project.jobs() == new, "no existing row changes"
    project.mochi("pretrain", "--method", "moco-hardest", "--seed", "0")
    (metrics,) = project.folder.glob("results/tiny/**/moco-hardest/**/metrics.csv")
    with metrics.open() as file:
        first, second = csv.DictReader(file)
    assert math.isclose(float(first["chance"]), math.log(1 + TINY["pretrain"]["queue_size"]))
    assert math.isclose(float(second["chance"]), math.log(1 + 32))
    assert 0 < float(second["loss"]) < 2 * float(second["chance"])
    project.edit(CONFIG, "num_hardest: 32,", "num_hardest: 101,")
    output = project.run("python", "-m", "mochi", "check").stderr
    assert (
        "methods.moco-hardest: negatives.num_hardest: found 101; expected 1 to 100 (queue_size)" in output
    )


SOURCE = """
import numpy as np

from mochi.data.ingest.raw import ArraySplit, RawDataset


def collect(config, cache):
    images = np.load(config.path)
    labels = np.arange(len(images)) % 2
    part = ArraySplit(images.shape, lambda: iter([images]), labels, [str(label) for label in labels])
    return RawDataset(config.path, "mine", ["even", "odd"], {"train": part, "val": part})
"""
SECTION = '''
class NpyFile(Source):
    """Images in an array."""

    source: Literal["npy-file"]
    """Selects this source."""
    path: str
    """The array."""


Dataset = Annotated['''


def test_a_new_data_source_is_a_module_a_section_and_a_name(tmp_path: Path) -> None:
    project = Project.new(tmp_path / "project")
    (project.folder / "mochi/data/ingest/sources/npy_file.py").write_text(SOURCE)
    project.edit("mochi/config/datasets.py", "Dataset = Annotated[", SECTION)
    project.edit("mochi/config/datasets.py", "ImageNet, Field(", "ImageNet | NpyFile, Field(")
    np.save(project.folder / "x.npy", np.zeros((64, 16, 16, 3), np.uint8))
    (folder,) = re.findall(r"^dataset:\n(?:  .*\n)*", FILE.read_text(), re.MULTILINE)
    project.edit(CONFIG, folder, "dataset: {source: npy-file, name: mine, path: x.npy}\n")
    project.mochi("prepare")
    manifest = json.loads((project.folder / "data/mine/manifest.json").read_text())
    assert manifest["splits"]["train"]["classes"] == {"even": 32, "odd": 32}
    assert "ready" in project.mochi("check")
