"""Mistakes in a detection set, each named with its key."""

from typing import Any

import pytest

from mochi.config import ConfigError, parse_experiment
from tests.detection.sets import tiny_with_detection


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["random-int"]}, "few.methods: unknown key 'random-int'; did you mean 'random-init'"),
        ({"pretrain_seeds": [7]}, r"detection.few.pretrain_seeds: found \[7\]; no method has them"),
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_set_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_experiment(tiny_with_detection(**changes), "x.yaml")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {"micro_batch": 3}, "micro_batch: found 3; it must divide batch_size = 2"),
        ("training", {"lr": [0.1, 0.2]}, "several lr candidates need `search_iterations` and `validation`"),
        ("training", {"lr_drops": [99]}, r"lr_drops: found \[99\]"),
        ("training", {"schedule": "cosine"}, "lr_drops belong to schedule step"),
        ("training", {"seeds": [1, 1]}, "seeds must be distinct"),
        ("training", {"BASE_LR": 0.1}, "unknown key 'BASE_LR'; allowed: batch_size, checkpoint"),
        ("model", {"masks": True}, "masks: found true with format voc"),
        ("model", {"proposals_test": [5]}, "proposals_test"),
        ("data", {"interpolation": None}, "format voc needs `classes`"),
        ("data", {"classes": None}, "format voc needs `classes`"),
        ("data", {"classes": ["a", "a"]}, "names must be distinct"),
    ],
)
def test_mistakes_in_a_section_are_named(section: str, changes: dict[str, Any], message: str) -> None:
    data = tiny_with_detection()
    data["evaluation"]["detection"]["few"][section] |= changes
    with pytest.raises(ConfigError, match=message):
        parse_experiment(data, "x.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {"scenes": {"image_size": 64, "num_train": 6, "num_test": 3, "seed": 1}},
        {"scenes": None},
        {"classes": ["coffee", "brick"]},
        {"classes": ["brick", "grass"], "path": "data//few-scenes/"},
    ],
)
def test_sets_that_share_a_folder_of_scenes_must_agree(changes: dict[str, Any]) -> None:
    """Otherwise the second set would be trained on the scenes of the first."""
    data = tiny_with_detection()
    data["evaluation"]["detection"]["few-frozen"]["data"] |= changes
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, "x.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith("x.yaml: evaluation: detection.few-frozen.data.path: found 'data/")
    assert "as in detection.few, with other `scenes` or `classes`" in line
    data["evaluation"]["detection"]["few-frozen"]["data"]["path"] = "data/others"
    parse_experiment(data, "x.yaml")


def test_sets_of_the_user_can_share_a_folder() -> None:
    """`path` may hold several VOC trees, each with its classes."""
    data = tiny_with_detection()
    sets = data["evaluation"]["detection"].values()
    for chosen, folder, classes in zip(
        sets, ("raccoon", "BCCD"), (["raccoon"], ["RBC", "WBC"]), strict=True
    ):
        own = {"path": "data", "train": [f"{folder}/train"], "test": [f"{folder}/val"], "classes": classes}
        chosen["data"] |= {**own, "scenes": None}
    read = parse_experiment(data, "x.yaml").evaluation.detection.values()
    assert [chosen.data.classes for chosen in read] == [["raccoon"], ["RBC", "WBC"]]
