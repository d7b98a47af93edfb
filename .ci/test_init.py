"""From a folder of real images to the report with three commands: mochi init, mochi check, snakemake."""

import os
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.project import Project

DATA = Path(os.environ.get("MOCHI_REAL_DATA", "nowhere"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="MOCHI_REAL_DATA is not set")


def unpacked(archive: str, folder: Path) -> None:
    with tarfile.open(DATA / archive) as content:
        content.extractall(folder, filter="data")


@pytest.mark.parametrize(
    ("archive", "images", "tasks"),
    [
        ("flowers-128.tar", "flowers", {"linear", "knn"}),
        ("flowers-originals-50.tar", "photos", set()),
        ("voc-raccoon.tar", "raccoon", {"detection-raccoon"}),
        ("coco-tiny.tar", "coco-tiny", {"detection-coco-tiny"}),
    ],
)
def test_three_commands_from_images_to_the_report(
    archive: str, images: str, tasks: set[str], tmp_path: Path
) -> None:
    project = Project.new(tmp_path / "project")
    unpacked(archive, tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    if images == "photos":  # without their classes
        (project.folder / images).mkdir()
        for number, file in enumerate(sorted(path for path in folder.rglob("*.jpg"))):
            file.rename(project.folder / images / f"{number}.jpg")
    else:
        folder.rename(project.folder / images)
    output = project.mochi("init", images, "--out", "config/mine.yaml", "--hours", "0.01")
    assert "images/s per run" in output
    assert "mine: " in project.mochi("check", "config/mine.yaml")
    done = project.run("snakemake", "--cores", "2", "--configfile", "config/mine.yaml", seconds=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    results = project.folder / "results/mine"
    rows = yaml.safe_load((project.folder / "config/mine.yaml").read_text())["methods"]
    for method in rows:
        found = {path.name for path in (results / "evaluations" / method / "seed0").glob("*")}
        assert found >= tasks, method
    assert (results / "summary.md").exists()
    assert " 0 failed" not in project.mochi("status", "config/mine.yaml")
    assert "done" in project.mochi("status", "config/mine.yaml").splitlines()[0]
    assert project.jobs("--configfile", "config/mine.yaml") == {}
