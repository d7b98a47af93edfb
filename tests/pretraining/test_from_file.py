"""A row whose encoder is a file: it is copied, not trained, and its result depends on the bytes of the
file.
"""

import shutil
from pathlib import Path

import pytest
import torch

from mochi.config import ConfigError, Encoder, Experiment, parse_experiment, pretrain_run
from mochi.encoders import build
from mochi.encoders.files import EncoderError, EncoderInfo, save_encoder
from mochi.preflight import check
from mochi.pretraining import stage
from mochi.provenance.wanted import Result, evaluated, pretrained
from tests.pretraining.runs import record
from tests.tiny import TINY, changed


def experiment(**row: object) -> Experiment:
    return parse_experiment(changed("methods/imported", {"objective": "file", **row}), "x.yaml")


@pytest.fixture
def file(tmp_path: Path, tiny: Experiment) -> Path:
    path = tmp_path / "X.safetensors"
    save_encoder(path, build(tiny.encoder, seed=7), EncoderInfo.of(tiny.encoder, method="theirs"))
    return path


def compute(file: Path, folder: Path) -> Result:
    wanted = experiment(path=str(file))
    result = pretrained(wanted, "imported", 0)
    result = Result(**{**vars(result), "folder": folder / "out"})
    stage.run(pretrain_run(wanted, "imported", 0), result, folder / "work")
    return result


def test_the_encoder_is_the_file_and_depends_on_its_bytes(file: Path, tmp_path: Path) -> None:
    result = compute(file, tmp_path)
    assert (tmp_path / "out/encoder.safetensors").read_bytes() == file.read_bytes()
    assert (tmp_path / "out/metrics.csv").read_text() == "epoch\n"
    assert list(record(tmp_path)["inputs"]) == ["encoder"]
    assert result.why_stale() is None
    moved = shutil.move(file, tmp_path / "moved.safetensors")
    wanted = pretrained(experiment(path=str(moved)), "imported", 0)
    assert Result(**{**vars(wanted), "folder": result.folder}).why_stale() is None
    save_encoder(Path(moved), build(experiment(path="x").encoder, seed=8))
    assert str(result.why_stale()).endswith("X.safetensors is missing")
    stale = Result(**{**vars(wanted), "folder": result.folder}).why_stale()
    assert stale == f"input: {moved} changed"


def test_the_settings_are_the_architecture_and_the_seed(file: Path) -> None:
    run = pretrain_run(experiment(path=str(file)), "imported", 0)
    assert run.settings() == {"seed": 0, "encoder": TINY["encoder"], "recipe": {"objective": "file"}}
    assert not run.is_trained
    assert (
        evaluated(experiment(path="x"), "imported", 0, "knn").inputs["encoder"].name
        == "encoder.safetensors"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "methods.imported.path: missing"),
        ({"path": ""}, "methods.imported.path: found ''"),
        ({"path": "x", "lr": 0.1}, "methods.imported.lr: unknown key 'lr'"),
        ({"path": "x", "where": "y"}, "methods.imported.where: unknown key 'where'; .*path"),
    ],
)
def test_a_mistake_in_the_row_is_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(**row)


def test_only_rows_from_a_file_have_a_path() -> None:
    with pytest.raises(ConfigError, match=r"methods.moco.path: unknown key 'path'"):
        parse_experiment(changed("methods/moco", {"path": "x"}), "x.yaml")


def test_check_names_a_file_that_is_missing_or_does_not_match(tmp_path: Path) -> None:
    def errors() -> list[str]:
        return [finding.text for finding in check(experiment(path=str(path))) if finding.level == "error"]

    path = tmp_path / "X.safetensors"
    assert errors()[0].startswith(f"methods.imported.path: {path}: no such encoder")
    save_encoder(path, build(Encoder(architecture="resnet10", stem="half", width=4), seed=0))
    assert errors()[0].startswith(
        f"methods.imported.path: {path} is not a resnet10 with stem half and width 8"
    )
    torch.save({}, path)
    assert "`mochi import` converts other checkpoints" in errors()[0]


def test_an_encoder_that_does_not_match_gives_no_result(tmp_path: Path) -> None:
    path = tmp_path / "X.safetensors"
    save_encoder(path, build(Encoder(architecture="resnet10", stem="full", width=8), seed=0))
    with pytest.raises(EncoderError, match="its metadata says resnet10 with stem full and width 8"):
        compute(path, tmp_path)
    assert not (tmp_path / "out/encoder.safetensors").exists()
