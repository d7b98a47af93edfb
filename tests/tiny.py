"""The tiny experiment of tests/tiny.yaml, with the changes that a test needs."""

import copy
from pathlib import Path
from typing import Any

import yaml

from mochi.config import Experiment, parse_experiment

FILE = Path(__file__).parent / "tiny.yaml"
TINY: dict[str, Any] = yaml.safe_load(FILE.read_text())
MOCHI = "mochi-16-24-8"


def changed(path: str, value: Any, base: dict[str, Any] = TINY) -> dict[str, Any]:
    """The content of the experiment file with one key changed, such as `pretrain/lr`."""
    data = copy.deepcopy(base)
    *parents, last = path.split("/")
    section = data
    for key in parents:
        section = section[key]
    section[last] = value
    return data


def with_recipe(**recipe: Any) -> Experiment:
    """The experiment with changed keys in the shared recipe, and a row of plain MoCo."""
    data = changed("methods/moco-v2", {})
    data["pretrain"] |= recipe
    return parse_experiment(data, "tiny")


def with_protocol(task: str, /, **protocol: Any) -> Experiment:
    """The experiment with changed keys in one evaluation."""
    data = copy.deepcopy(TINY)
    data["evaluation"][task] = data["evaluation"].get(task, {}) | protocol
    return parse_experiment(data, "tiny")
