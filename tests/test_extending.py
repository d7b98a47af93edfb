"""docs/extending.md, followed to the letter: its file and its lines in an experiment, and nothing else."""

import json
import re
from pathlib import Path

from tests.project import CONFIG, ROOT, Project

PAGE = (ROOT / "docs/extending.md").read_text()


def block(language: str, containing: str) -> str:
    """The page's block of code with a text in it."""
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
    assert project.jobs() == {"evaluate": 2 * 3, "report": 1}, "no result that was there is computed again"
    for task in ("nearest-mean", "centered"):
        project.mochi("evaluate", task, "--method", "random-init", "--seed", "0")
    folder = project.folder / "results/tiny/evaluations/random-init/seed0"
    metrics, centered = (
        json.loads((folder / task / "metrics.json").read_text()) for task in ("nearest-mean", "centered")
    )
    assert 12.5 < metrics["top1"] < 100, "far above the 6.25 % of a guess"
    assert centered["top1"] != metrics["top1"]
    assert (folder / "centered/confusion.csv").read_text().count("\n") > 16
    assert project.jobs() == {"evaluate": 2 * 2, "report": 1}
    assert not (project.folder / "work").exists(), "what the two shared is gone"
    project.edit(CONFIG, "center: true", "centre: true")
    said = project.run("python", "-m", "mochi", "check").stderr
    assert "evaluation.centered.centre: unknown key 'centre'; did you mean 'center'?" in said
