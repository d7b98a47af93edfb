"""The tiny experiment of tests/tiny.yaml, changed as a test needs it."""

import copy
from pathlib import Path
from typing import Any

import yaml

from mochi.config import Experiment, parse_experiment

FILE = Path(__file__).parent / "tiny.yaml"
TINY: dict[str, Any] = yaml.safe_load(FILE.read_text())
MOCHI = "mochi-16-24-8"


def changed(path: str, value: Any, base: dict[str, Any] = TINY) -> dict[str, Any]:
    """The content of an experiment file with one key set, such as `pretrain/lr`."""
    data = copy.deepcopy(base)
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place[key]
    place[last] = value
    return data


def with_recipe(**recipe: Any) -> Experiment:
    """The experiment with other keys of the shared recipe, and with a row of plain MoCo."""
    data = changed("methods/moco-v2", {})
    data["pretrain"] |= recipe
    return parse_experiment(data, "tiny")


def with_protocol(task: str, /, **protocol: Any) -> Experiment:
    """The experiment with other keys of one evaluation."""
    data = copy.deepcopy(TINY)
    data["evaluation"][task] = data["evaluation"].get(task, {}) | protocol
    return parse_experiment(data, "tiny")
