"""The JSON Schema of experiment files is valid and accepts the shipped ones."""

import importlib
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
        (["pretrain", "lr"], 0),
        (["pretrain", "momentum"], 1),
        (["augmentation", "min_scale"], 1.5),
    ],
)
def test_mistakes_do_not_match(schema: Any, keys: list[str], value: object) -> None:
    experiment = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    section = experiment
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    assert list(Draft202012Validator(schema).iter_errors(experiment))


def test_rows_of_the_documentation_match(schema: Any) -> None:
    experiment = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    experiment["methods"]["released"] = {"objective": "file", "path": "moco.safetensors", "seeds": [0]}
    experiment["methods"]["longer"] = {"epochs": 400, "augmentation": {"blur": False}}
    Draft202012Validator(schema).validate(experiment)


def test_every_key_is_described(schema: Any) -> None:
    """Editors and the documentation show these: the docstrings of the fields."""
    sections = {"Experiment": schema, **schema["$defs"]}
    assert len(sections) > 20
    for name, section in sections.items():
        assert section.get("description"), f"{name} has no docstring"
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key} has no docstring"
    described = {
        "Augmentation": ("image_size", "Side of a view"),
        "LinearProbe": ("lr_candidates", "held-out"),
        "Method": ("key_momentum", "momentum encoder"),
        "Debiased": ("positive_prior", "share of negatives of the query's class"),
        "HardWeighting": ("positive_prior", "share of negatives of the query's class"),
        "SynCo": ("warmup_epochs", "Initial epochs"),
    }
    for name, (key, text) in described.items():
        assert text in sections[name]["properties"][key]["description"]


def test_the_shared_recipe_has_the_defaults_and_a_method_has_none(schema: Any) -> None:
    """A method without a key takes it from the shared recipe."""
    shared, method = (schema["$defs"][name]["properties"] for name in ("Pretrain", "Method"))
    assert shared["optimizer"]["default"] == "sgd"
    assert shared["negatives"]["default"]["rule"] == "moco"
    assert "default" not in shared["epochs"]
    assert {key for key, value in method.items() if "default" in value} == {"objective"}
    assert not any(
        "default" in value for value in schema["$defs"]["MethodAugmentation"]["properties"].values()
    )


def test_the_reference_page_names_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    page = importlib.import_module("reference_pages").configuration()
    types = [row.split(" | ")[1] for row in page.splitlines() if row.startswith("| `")]
    assert "by name: [DetectionSet](#detectionset)" in types
    assert any(each.endswith("`wide_resnet50_2` or `timm:NAME`") for each in types)
    assert not {"any", "keys"} & {part for each in types for part in each.split(" or ")}
