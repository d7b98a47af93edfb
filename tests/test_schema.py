"""The JSON Schema of experiment files is valid and accepts the shipped ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from mochi.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def schema() -> Any:
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_matches_the_schema(schema: Any, path: Path) -> None:
    Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["dataset", "pach_size"], 3),
        (["pretrain", "temprature"], 0.1),
        (["methods", "moco-v2", "epochs"], "many"),
        (["encoder", "width"], 0),
        (["methods", "moco-v2", "negatives"], {"rule": "debiased", "prior": 0.1}),
        (["methods", "moco-v2", "masks"], ["oracle"]),
        (["evaluation", "imagesize"], 32),
        (["evaluation", "knn", "kk"], 20),
        (["evaluation", "linear", "lr"], "fast"),
    ],
)
def test_mistakes_do_not_match(schema: Any, keys: list[str], value: object) -> None:
    experiment = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    section = experiment
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    assert list(Draft202012Validator(schema).iter_errors(experiment))


def test_keys_are_described(schema: Any) -> None:
    """Editors show the docstrings of the fields."""
    assert "Side of a view" in schema["$defs"]["Augmentation"]["properties"]["image_size"]["description"]
    assert "held-out" in schema["$defs"]["LinearProbe"]["properties"]["lr_candidates"]["description"]
    assert "key_momentum" in schema["$defs"]["Pretrain"]["properties"]
