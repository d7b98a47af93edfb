"""The stop at the first NaN or Inf, and the status of a training."""

import math
from pathlib import Path

import pytest

from mochi.runtime.monitoring import NonFiniteError, check_finite, training_status

# Accuracies of a MoCo-v2 training whose queue is half of the data set: they fall.
FALLING = [0.094, 0.097, 0.133, 0.103, 0.093, 0.063, 0.058, 0.050, 0.044, 0.046]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "learning"),
        ({"accuracies": {}}, "learning"),
        ({"loss": math.log(65537)}, "at chance"),
        ({"queue_fill": 0.5, "loss": 20.0}, "queue filling (50%): a rising loss is normal"),
        ({"queue_fill": 0.5, "accuracies": {0: 0.9, 1: 0.1}}, "queue filling (50%)"),
        ({"feature_std": 0.001}, "collapsed"),
        ({"accuracies": {3: 0.5, 4: 0.3}}, "accuracy falling since epoch 3: 50.0% then, 30.0% now"),
        ({"accuracies": {3: 0.5, 4: 0.3}, "loss": math.log(65537)}, "accuracy falling since epoch 3"),
        ({"accuracies": {3: 0.30, 4: 0.28}}, "learning"),
        ({"accuracies": {3: 0.2, 4: 0.1, 5: 0.3}}, "learning"),
    ],
)
def test_status_of_a_training(changes: dict[str, object], words: str) -> None:
    healthy = {
        "loss": 7.0, "chance": math.log(65537), "feature_std": 0.088, "queue_fill": 1.0, "dim": 128,
        "accuracies": {1: 0.1, 2: 0.2, 3: 0.3},
    }  # fmt: skip
    assert training_status(**(healthy | changes)).startswith(words)  # type: ignore[arg-type]


def test_a_falling_accuracy_is_reported() -> None:
    statuses = [
        training_status(
            loss=6.6,
            chance=7.6,
            feature_std=0.04,
            queue_fill=1.0,
            dim=128,
            accuracies=dict(enumerate(FALLING[: epoch + 1])),
        )
        for epoch in range(len(FALLING))
    ]
    assert statuses[:4] == ["learning"] * 4
    assert all(status.startswith("accuracy falling since epoch 2: 13.3% then") for status in statuses[4:])


def test_a_loss_that_is_not_finite_stops_and_names_step_rate_and_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "last.safetensors"
    check_finite(1.0, step=3, lr=0.1, last_good=saved)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 3 \(learning rate 0\.1\).*none yet"):
        check_finite(math.nan, step=3, lr=0.1, last_good=saved)
    saved.touch()
    with pytest.raises(NonFiniteError, match=str(saved)):
        check_finite(math.inf, step=3, lr=0.1, last_good=saved)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_parameters_that_are_not_finite_stop_too(tmp_path: Path, norm: float) -> None:
    """The loss of that step is from before the update and still finite."""
    check_finite(1.0, step=3, lr=0.1, last_good=tmp_path, norm=7.0)
    with pytest.raises(NonFiniteError, match=rf"parameters is {norm} at step 3 \(learning rate 0\.1\)"):
        check_finite(1.0, step=3, lr=0.1, last_good=tmp_path, norm=norm)
