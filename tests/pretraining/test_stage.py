"""A killed training ends with the same bytes; its files contain what they should; mistakes are refused
before any compute.
"""

import csv
import itertools
import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mochi.config import Contrastive, Experiment, parse_experiment, pretrain_run
from mochi.contrast import moco as moco_module
from mochi.data.views.loading import Loading, _shuffled
from mochi.encoders.heads import projection_head
from mochi.encoders.resnet import ResNet
from mochi.errors import DataError
from mochi.pretraining import stage
from mochi.provenance.fingerprint import file_digest
from mochi.runtime import monitoring
from mochi.runtime.monitoring import NonFiniteError
from mochi.storage import checkpoint
from mochi.storage.checkpoint import CheckpointError
from tests.pretraining.runs import encoder_bytes, record, result_in, rows, saved_in, steps_done, train
from tests.processes import context
from tests.tiny import MOCHI, changed, with_recipe

EVERY_STEP = 1e-9
"""As `checkpoint_minutes`: a checkpoint after every step that is checked."""


@pytest.fixture(scope="session")
def uninterrupted(tiny: Experiment, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(tiny, tiny_data, folder)
    return folder


def test_the_encoder_loads_in_torchvision(uninterrupted: Path, tiny: Experiment) -> None:
    ResNet(tiny.encoder).load_state_dict(load_file(uninterrupted / "out" / "encoder.safetensors"))
    head = load_file(uninterrupted / "out" / "head.safetensors")
    projection_head(64, 16, "mlp").load_state_dict(head)
    assert not list((uninterrupted / "work").iterdir()), "no checkpoint is left"


def test_metrics_describe_each_epoch(uninterrupted: Path) -> None:
    first, second = rows(uninterrupted)
    # 160 images in batches of 32; K = 100; s + s' = 32 once the warm-up epoch is over.
    assert float(first["chance"]) == pytest.approx(math.log(101))
    assert float(second["chance"]) == pytest.approx(math.log(133))
    assert first["accuracy"] == first["accuracy_with_synthetics"]
    assert float(second["accuracy"]) >= float(second["accuracy_with_synthetics"])
    assert float(first["queue_fill"]) == 1.0
    assert first["false_parents_any"] == ""
    assert 0 <= float(second["false_parents_all"]) <= float(second["false_parents_any"]) <= 1
    assert float(second["lr"]) == pytest.approx(0.03)
    assert 0 < float(second["feature_std"]) < 1
    assert second["status"]
    with (uninterrupted / "out" / "matching.csv").open() as file:
        matching = list(csv.DictReader(file))
    assert [(row["epoch"], row["rank"]) for row in matching] == [
        (str(epoch), str(rank)) for epoch in (0, 1) for rank in range(1, 101)
    ]
    probabilities = [float(row["probability"]) for row in matching[:100]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) < 1


def test_the_result_is_current_and_has_provenance(
    uninterrupted: Path, tiny: Experiment, tiny_data: Path
) -> None:
    result = result_in(uninterrupted, tiny, tiny_data)
    assert result.why_stale() is None
    assert result_in(uninterrupted, with_recipe(lr=0.07), tiny_data).why_stale() == (
        "settings: recipe.lr 0.06 -> 0.07"
    )
    written = record(uninterrupted)
    assert written["settings"]["recipe"]["queue_size"] == 100
    assert written["code_digests"] == [written["code_digest"]]
    assert written["inputs"]["data"]["path"] == str(tiny_data / "manifest.json")
    assert written["world_size"] == 1


def test_same_seed_same_bytes_other_seed_other_bytes(
    uninterrupted: Path, tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    assert train(tiny, tiny_data, tmp_path / "again") == encoder_bytes(uninterrupted)
    assert rows(tmp_path / "again") == rows(uninterrupted)
    assert train(tiny, tiny_data, tmp_path / "other", seed=1) != encoder_bytes(uninterrupted)


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL, then the same command: bit-identical to an uninterrupted run, every time.

    `.ci/test_random_kills.py` has more kills, and several processes.
    """
    forks = context()
    expected = train(with_recipe(epochs=12), tiny_data, tmp_path / "whole")
    # A checkpoint after every step, so that kills happen while it is written as well as during computation.
    careful = with_recipe(epochs=12, checkpoint_minutes=EVERY_STEP)
    moments = random.Random(0)
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        process = forks.Process(target=train, args=(careful, tiny_data, folder))
        process.start()
        # A random step of the 60, and a random moment in it.
        target = moments.randrange(55)
        while steps_done(saved_in(folder)) < target:
            assert process.is_alive()
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the kill came after the end"
        assert train(careful, tiny_data, folder) == expected, target
        assert rows(folder) == rows(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_the_interval_of_checks_does_not_change_the_bytes(
    stop: int, uninterrupted: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the loss is checked at some steps only, and a run resumes between two of them."""
    experiment = with_recipe(checkpoint_minutes=EVERY_STEP)
    at_step(stop, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(experiment, tiny_data, tmp_path)
    monkeypatch.undo()
    assert steps_done(saved_in(tmp_path)) == stop
    monkeypatch.setitem(monitoring.CHECK_INTERVAL, "cpu", 3)
    assert train(experiment, tiny_data, tmp_path) == encoder_bytes(uninterrupted)
    assert rows(tmp_path) == rows(uninterrupted)


def at_step(step: int, do: Callable[[torch.nn.Parameter], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the first parameter after the gradients of this step of the next run."""
    update, steps = torch.optim.SGD.step, itertools.count()

    def faulty(optimizer: torch.optim.SGD, *arguments: Any) -> None:
        if next(steps) == step:
            do(optimizer.param_groups[0]["params"][0])
        update(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", faulty)


def interrupt(_: torch.nn.Parameter) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_training_keeps_the_previous_result(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change `epochs`, start, press Ctrl-C, change it back: nothing to compute."""
    train(tiny, tiny_data, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    at_step(12, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(with_recipe(epochs=3), tiny_data, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert result_in(tmp_path, tiny, tiny_data).why_stale() is None


def test_random_init_has_the_initial_weights_of_the_seed(
    tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    train(tiny, tiny_data, tmp_path, "random-init")
    assert rows(tmp_path) == []
    assert load_file(tmp_path / "out" / "head.safetensors") == {}
    weights = load_file(tmp_path / "out" / "encoder.safetensors")
    torch.manual_seed(0)
    for name, value in ResNet(tiny.encoder).state_dict().items():
        assert torch.equal(weights[name], value), name
    assert result_in(tmp_path, tiny, tiny_data, "random-init").why_stale() is None


def test_the_supervised_row_learns_the_labels(tiny_data: Path, tmp_path: Path) -> None:
    content = changed("methods/supervised", {"objective": "supervised", "epochs": 4})
    train(parse_experiment(content, "tiny"), tiny_data, tmp_path, "supervised")
    found = rows(tmp_path)
    assert float(found[-1]["loss"]) < float(found[0]["loss"])
    assert float(found[0]["chance"]) == pytest.approx(math.log(16))


def test_a_checkpoint_of_another_run_is_refused(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    saved = saved_in(tmp_path)
    checkpoint.save(saved, {"a": torch.zeros(1)}, {}, {"method": "moco-v2", "seed": 3})
    with pytest.raises(CheckpointError, match=r"method=moco-v2.*method=mochi-16-24-8"):
        train(tiny, tiny_data, tmp_path)
    assert saved.exists()


def test_a_resume_on_other_data_is_refused(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name with another manifest, prepared from other files."""
    at_step(7, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(with_recipe(checkpoint_minutes=EVERY_STEP), tiny_data, tmp_path)
    monkeypatch.undo()
    other = shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name)
    (other / "manifest.json").write_text((tiny_data / "manifest.json").read_text() + "\n")
    digests = [file_digest(folder / "manifest.json") for folder in (tiny_data, other)]
    with pytest.raises(
        CheckpointError,
        match="with manifest.json={}; this is the run with manifest.json={}.*and data".format(*digests),
    ):
        train(tiny, other, tmp_path)


def test_a_resume_with_other_code_is_recorded(
    tiny: Experiment,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    at_step(7, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(with_recipe(checkpoint_minutes=EVERY_STEP), tiny_data, tmp_path)
    monkeypatch.undo()
    before = result_in(tmp_path, tiny, tiny_data)
    after = replace(before, modules=(*before.modules, "mochi.stages"))
    stage.run(pretrain_run(tiny, MOCHI, 0), after, tmp_path / "work")
    assert record(tmp_path)["code_digests"] == [before.code_digest, after.code_digest]
    assert "the code changed since the checkpoint was written" in caplog.text


def test_the_recorded_time_is_that_of_all_attempts(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.Stopwatch, "seconds", lambda _: 100.0)
    at_step(7, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(with_recipe(checkpoint_minutes=EVERY_STEP), tiny_data, tmp_path)
    train(tiny, tiny_data, tmp_path)
    assert record(tmp_path)["wall_seconds"] == 200.0


@pytest.mark.parametrize(("minutes", "saves"), [(EVERY_STEP, 15), (60, 1)])
def test_checkpoints_are_written_when_due_and_at_the_end(
    minutes: float, saves: int, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after every epoch: small epochs take a few seconds."""
    positions, save = [], checkpoint.save

    def watched(path: Path, tensors: Any, state: Any, identity: Any) -> None:
        positions.append((state["epoch"], state["step"]))
        save(path, tensors, state, identity)

    monkeypatch.setattr(stage.checkpoint, "save", watched)
    train(with_recipe(epochs=3, checkpoint_minutes=minutes), tiny_data, tmp_path)
    assert len(positions) == saves
    assert positions[-1] == (3, 0)


def test_a_batch_larger_than_the_data_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"batch_size: found 161; the set has 160 images"):
        train(with_recipe(batch_size=161), tiny_data, tmp_path)


def test_missing_data_names_what_to_run(tiny: Experiment, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare"):
        train(tiny, tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize(
    ("queue_size", "masks", "warned"),
    [(80, [], False), (81, [], True), (320, [], True), (320, ["same_image"], False)],
)
def test_a_queue_larger_than_half_of_the_data_gives_a_warning(
    queue_size: int, masks: list[str], warned: bool
) -> None:
    recipe = pretrain_run(with_recipe(queue_size=queue_size, masks=masks), "moco-v2", 0).recipe
    assert isinstance(recipe, Contrastive)
    text = stage.queue_warning(recipe, 160)
    assert (text is not None) is warned
    if text is not None:
        assert f"queue_size = {queue_size} is {queue_size / 160:.2f} times the 160 training images" in text


@pytest.mark.parametrize(("num_images", "batch_size"), [(50, 8), (48, 8), (30, 30)])
@pytest.mark.parametrize("queue_size", [20, 45, 64, 130])
def test_the_number_of_own_older_keys_equals_a_count(
    queue_size: int, num_images: int, batch_size: int
) -> None:
    """In the order in which a training loads images, over many epochs."""
    rows, queue, counts = np.arange(num_images), [], []
    loading = Loading(batch_size, torch.device("cpu"))
    epochs = range(400)
    for epoch, batch in _shuffled(rows, loading, 0, epochs, 0):
        if epoch >= 6:  # the queue is full
            counts += [queue.count(row) for row in batch.tolist()]
        queue = (queue + batch.tolist())[-queue_size:]
    number, share = stage.own_older_keys(queue_size, num_images, batch_size)
    assert number == pytest.approx(np.mean(counts), abs=0.02)
    assert share == pytest.approx(np.mean(np.array(counts) > 0), abs=0.02)


def test_a_loss_that_is_not_finite_stops_the_training(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"at step \d+ \(learning rate 1e\+30\).*none yet"):
        train(with_recipe(lr=1e30), tiny_data, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("fault", [3, 4, 8])
def test_parameters_that_are_not_finite_are_not_saved(
    interval: int,
    fault: int,
    uninterrupted: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A NaN gradient, in the middle and at the end of an epoch of 5 steps; the loss before it is finite.
    The checkpoint is from an earlier step, and without the fault the run resumes from it.
    """
    experiment = with_recipe(checkpoint_minutes=EVERY_STEP)
    monkeypatch.setitem(monitoring.CHECK_INTERVAL, "cpu", interval)
    at_step(fault, lambda parameter: parameter.grad[0, 0].fill_(math.nan), monkeypatch)
    with pytest.raises(NonFiniteError, match=r"Last good checkpoint: .*checkpoint\.safetensors"):
        train(experiment, tiny_data, tmp_path)
    monkeypatch.undo()
    assert 0 < steps_done(saved_in(tmp_path)) <= fault
    for name, value in load_file(saved_in(tmp_path)).items():
        assert value.isfinite().all(), name
    assert train(experiment, tiny_data, tmp_path) == encoder_bytes(uninterrupted)
    assert rows(tmp_path) == rows(uninterrupted)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_encoder_computes_in_the_precision_of_the_recipe(
    precision: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()

    def unit(features: torch.Tensor) -> torch.Tensor:
        found.add(features.dtype)
        return normalise(features)

    normalise = moco_module.unit
    monkeypatch.setattr(moco_module, "unit", unit)
    train(with_recipe(precision=precision), tiny_data, tmp_path)
    assert found == {getattr(torch, precision)}
    assert record(tmp_path)["precision"] == precision
