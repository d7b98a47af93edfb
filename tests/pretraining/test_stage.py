"""Training ends with the same bytes whether or not it was killed on the way; what it writes means what it
says; and what is wrong is refused before anything is computed."""

import csv
import itertools
import json
import math
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from mochi.config import Experiment, Run, resolve
from mochi.contrast import moco as moco_module
from mochi.contrast.moco import MoCo
from mochi.contrast.negatives import hardest, mix_pairs, mix_with_query
from mochi.data.format import DataError, open_dataset
from mochi.data.views.loading import Loading, two_views
from mochi.encoders.resnet import ResNet
from mochi.pretraining import stage as pretrain
from mochi.provenance.fingerprint import file_digest
from mochi.runtime.progress import NonFiniteError
from mochi.storage import checkpoint
from mochi.storage.checkpoint import CheckpointError
from tests.reference import mochi_loss, synthetic_vectors

MOCHI = "mochi-16-24-8"
TIMINGS = {"images_per_second", "data_wait"}


def changed(run: Run, **recipe: object) -> Run:
    return run.model_copy(update={"pretrain": run.pretrain.model_copy(update=recipe)})


def train(run: Run, data: Path, folder: Path) -> bytes:
    torch.set_num_threads(1)  # also where it is a process of its own; bytes depend on the number
    pretrain.run(run, data, folder / "out", folder / "work")
    return (folder / "out" / "encoder.safetensors").read_bytes()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def uninterrupted(tiny: Experiment, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(resolve(tiny, MOCHI, 0), tiny_data, folder)
    return folder


def test_the_product_is_a_torchvision_encoder(uninterrupted: Path, tiny: Experiment) -> None:
    weights = load_file(uninterrupted / "out" / "encoder.safetensors")
    ResNet(tiny.encoder).load_state_dict(weights)
    assert not (uninterrupted / "work" / "pretrain.safetensors").exists()


def test_metrics_say_what_happened(uninterrupted: Path) -> None:
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
    assert 0 < float(second["spread"]) < 1
    with (uninterrupted / "out" / "matching.csv").open() as file:
        matching = list(csv.DictReader(file))
    assert [row["epoch"] for row in matching] == ["0"] * 100 + ["1"] * 100
    probabilities = [float(row["probability"]) for row in matching[:100]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) < 1


def test_provenance_leads_back_to_settings_code_and_data(
    uninterrupted: Path, tiny: Experiment, tiny_data: Path
) -> None:
    provenance = json.loads((uninterrupted / "out" / "provenance.json").read_text())
    assert provenance["settings"]["pretrain"]["queue_size"] == 100
    assert provenance["code_digests"] == [provenance["code_digest"]]
    assert provenance["inputs"]["data"]["path"] == str(tiny_data / "manifest.json")
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]


def test_same_seed_same_bytes_other_seed_other_bytes(
    uninterrupted: Path, tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    expected = (uninterrupted / "out" / "encoder.safetensors").read_bytes()
    assert train(resolve(tiny, MOCHI, 0), tiny_data, tmp_path / "again") == expected
    assert rows(tmp_path / "again") == rows(uninterrupted)
    assert train(resolve(tiny, MOCHI, 1), tiny_data, tmp_path / "other") != expected


def test_killed_at_ten_random_moments(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL, then the same command: bit-identical to the run that nobody killed, every time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_pretrain"])
    run = changed(resolve(tiny, MOCHI, 0), epochs=12)
    expected = train(run, tiny_data, tmp_path / "whole")
    # A checkpoint after every step, so that kills hit its writing as well as the computing.
    careful = changed(run, checkpoint_minutes=1e-9)
    moments = random.Random(0)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        saved = folder / "work" / "pretrain.safetensors"
        process = context.Process(target=train, args=(careful, tiny_data, folder))
        process.start()
        # Some step of the 60, and some moment of that step.
        target = moments.randrange(55)
        while steps_done(saved) < target:
            assert process.is_alive()
            time.sleep(0.003)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the kill came after the end"
        assert train(careful, tiny_data, folder) == expected, target
        assert rows(folder) == rows(tmp_path / "whole")


def steps_done(saved: Path) -> int:
    """Steps in the checkpoint, of 5 an epoch; -1 where there is none."""
    if not saved.exists():
        return -1
    # safe_open opens a path twice, and the file is replaced all the time.
    with saved.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    state = json.loads(header["__metadata__"]["state"])
    return int(5 * state["epoch"] + state["step"])


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_device_that_is_seldom_asked_gets_the_same_bytes(
    stop: int,
    uninterrupted: Path,
    tiny: Experiment,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: looks at some steps only, and a resume from a step between two of them."""
    run = resolve(tiny, MOCHI, 0)
    at_step(stop, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(changed(run, checkpoint_minutes=1e-9), tiny_data, tmp_path)
    monkeypatch.undo()
    assert steps_done(tmp_path / "work" / "pretrain.safetensors") == stop
    monkeypatch.setitem(pretrain.STEPS_BETWEEN_LOOKS, "cpu", 3)
    expected = (uninterrupted / "out" / "encoder.safetensors").read_bytes()
    assert train(changed(run, checkpoint_minutes=1e-9), tiny_data, tmp_path) == expected
    assert rows(tmp_path) == rows(uninterrupted)


def at_step(step: int, do: Callable[[torch.nn.Parameter], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something to the first parameter after the gradients of this step of the next run."""
    average, steps = pretrain.average_gradients, itertools.count()

    def faulty(parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = list(parameters)
        average(parameters)
        if next(steps) == step:
            do(parameters[0])

    monkeypatch.setattr(pretrain, "average_gradients", faulty)


def interrupt(_: torch.nn.Parameter) -> None:
    raise KeyboardInterrupt


def test_floor_and_ceiling(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    train(resolve(tiny, "random-init", 0), tiny_data, tmp_path / "floor")
    assert rows(tmp_path / "floor") == []
    weights = load_file(tmp_path / "floor" / "out" / "encoder.safetensors")
    torch.manual_seed(0)
    for name, value in ResNet(tiny.encoder).state_dict().items():
        assert torch.equal(weights[name], value), name

    methods = {**tiny.methods, "supervised": {"objective": "supervised", "epochs": 4}}
    experiment = tiny.model_copy(update={"methods": methods})
    train(resolve(experiment, "supervised", 0), tiny_data, tmp_path / "ceiling")
    losses = [float(row["loss"]) for row in rows(tmp_path / "ceiling")]
    assert losses[-1] < losses[0]
    assert float(rows(tmp_path / "ceiling")[0]["chance"]) == pytest.approx(math.log(16))


def test_a_checkpoint_of_another_run_is_refused(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    run = resolve(tiny, MOCHI, 0)
    saved = tmp_path / "work" / "pretrain.safetensors"
    checkpoint.save(saved, {"a": torch.zeros(1)}, {}, {"method": "moco-v2", "seed": 3})
    with pytest.raises(CheckpointError, match=r"method=moco-v2.*method=mochi-16-24-8"):
        train(run, tiny_data, tmp_path)
    assert saved.exists()


def test_a_resume_on_other_data_is_refused(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name, another manifest: prepared again from other files."""
    run = resolve(tiny, MOCHI, 0)
    at_step(7, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_data, tmp_path)
    monkeypatch.undo()
    other = shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name)
    (other / "manifest.json").write_text((tiny_data / "manifest.json").read_text() + "\n")
    digests = [file_digest(folder / "manifest.json") for folder in (tiny_data, other)]
    with pytest.raises(
        CheckpointError,
        match="with manifest.json={}; this is the run with manifest.json={}.*and data".format(*digests),
    ):
        train(run, other, tmp_path)


def test_time_and_energy_are_those_of_all_sessions(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolve(tiny, MOCHI, 0)
    monkeypatch.setattr(pretrain.Stopwatch, "seconds", lambda _: 100.0)
    monkeypatch.setattr(pretrain.Stopwatch, "joules", lambda _: 5.0)
    at_step(7, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run, tiny_data, tmp_path)
    train(run, tiny_data, tmp_path)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (provenance["wall_seconds"], provenance["energy_joules"]) == (200.0, 10.0)


def test_a_batch_larger_than_the_data_is_refused(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    run = changed(resolve(tiny, MOCHI, 0), batch_size=161)
    with pytest.raises(DataError, match=r"batch_size: found 161; the set has 160 images"):
        train(run, tiny_data, tmp_path)


def test_missing_data_names_what_to_run(tiny: Experiment, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare"):
        train(resolve(tiny, MOCHI, 0), tmp_path / "nothing", tmp_path)


def test_a_queue_longer_than_the_data_is_warned_of(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(changed(resolve(tiny, MOCHI, 0), queue_size=320, epochs=1, mixing=None), tiny_data, tmp_path)
    assert "queue_size = 320 is 2.00 times the 160 training images" in caplog.text


def test_a_loss_that_is_no_number_stops(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    run = changed(resolve(tiny, MOCHI, 0), lr=1e30)
    with pytest.raises(NonFiniteError, match=r"at step \d+ \(learning rate 1e\+30\).*none yet"):
        train(run, tiny_data, tmp_path)
    assert not (tmp_path / "out" / "encoder.safetensors").exists()


@pytest.mark.parametrize("looks", [1, 3])
@pytest.mark.parametrize("fault", [3, 4, 8])
def test_what_an_update_ruined_is_not_saved(
    looks: int,
    fault: int,
    uninterrupted: Path,
    tiny: Experiment,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradient that is no number, in the middle of an epoch of 5 steps and at its end: the loss before
    it is fine. The checkpoint is of a step before, and without the fault the run goes on from it."""
    run = changed(resolve(tiny, MOCHI, 0), checkpoint_minutes=1e-9)
    monkeypatch.setitem(pretrain.STEPS_BETWEEN_LOOKS, "cpu", looks)
    at_step(fault, lambda parameter: parameter.grad[0, 0].fill_(math.nan), monkeypatch)
    with pytest.raises(NonFiniteError, match=r"Last good checkpoint: .*pretrain\.safetensors"):
        train(run, tiny_data, tmp_path)
    monkeypatch.undo()
    saved = tmp_path / "work" / "pretrain.safetensors"
    assert 0 < steps_done(saved) <= fault
    for name, value in load_file(saved).items():
        assert value.isfinite().all(), name
    expected = (uninterrupted / "out" / "encoder.safetensors").read_bytes()
    assert train(run, tiny_data, tmp_path) == expected
    assert rows(tmp_path) == rows(uninterrupted)


def plain_loop(run: Run, data: Path) -> tuple[MoCo, list[float]]:
    """The run as one would write it down without this package's loop: its last state and its losses."""
    recipe, mixing = run.pretrain, run.pretrain.mixing
    moco = MoCo(run.encoder, recipe, run.seed)  # for its first weights and keys
    optimizer = torch.optim.SGD(
        moco.query_encoder.parameters(), momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    losses, oldest, split = [], 0, open_dataset(data).split("train")

    def draws(stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((run.seed << 40) + (len(losses) << 4) + stream)

    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.lr * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
        loading = Loading(recipe.batch_size, torch.device("cpu"))
        for batch in two_views(split, run.augmentation, loading, seed=run.seed, epoch=epoch):
            query = F.normalize(moco.query_encoder(batch.query), dim=-1)
            with torch.no_grad():
                for ours, theirs in zip(
                    moco.momentum_encoder.parameters(), moco.query_encoder.parameters(), strict=True
                ):
                    ours.copy_(recipe.key_momentum * ours + (1 - recipe.key_momentum) * theirs)
                order, key = torch.randperm(len(query), generator=draws(1)), torch.empty_like(query)
                key[order] = F.normalize(moco.momentum_encoder(batch.key[order]), dim=-1)
            queue, vectors = moco.queue.keys.clone(), []
            if epoch >= mixing.warmup_epochs:
                similarity, generator = query.detach() @ queue.T, draws(2)
                pool = hardest(similarity, mixing.num_hardest)
                pairs = mix_pairs(queue, pool, mixing.num_pair_synthetics, generator)
                mixes = mix_with_query(similarity, pool, mixing.num_query_synthetics, generator)
                vectors = [synthetic_vectors(query.detach(), queue, each) for each in (pairs, mixes)]
            loss = mochi_loss(query, key, queue, recipe.temperature, vectors)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moco.queue.keys[torch.arange(oldest, oldest + len(key)) % len(queue)] = key
            oldest += len(key)
            losses.append(loss.item())
    return moco, losses


def test_the_run_is_a_plain_loop_over_the_algorithm(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch without mixing and one with: both encoders, the queue, and the losses of metrics.csv."""
    run = changed(resolve(tiny, MOCHI, 0), precision="float32", weight_decay=0.05)
    monkeypatch.setattr(pretrain.checkpoint, "discard", lambda path: None)
    train(run, tiny_data, tmp_path)
    saved = load_file(tmp_path / "work" / "pretrain.safetensors")
    moco, losses = plain_loop(run, tiny_data)
    for name, value in [*moco.named_parameters(), ("queue.keys", moco.queue.keys)]:
        torch.testing.assert_close(saved[f"module.{name}"], value, rtol=1e-3, atol=1e-3, msg=name)
    means = [sum(losses[:5]) / 5, sum(losses[5:]) / 5]
    assert [float(row["loss"]) for row in rows(tmp_path)] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_encoder_computes_in_the_precision_of_the_recipe(
    precision: str, tiny: Experiment, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()

    def unit(features: torch.Tensor) -> torch.Tensor:
        found.add(features.dtype)
        return normalise(features)

    normalise = moco_module.unit
    monkeypatch.setattr(moco_module, "unit", unit)
    train(changed(resolve(tiny, MOCHI, 0), precision=precision), tiny_data, tmp_path)
    assert found == {getattr(torch, precision)}
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["precision"] == precision


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [1.0, 0.5 * (1 + math.cos(0.1 * math.pi))]), ("step", [1.0, 1.0])],
)
def test_learning_rates(tiny: Experiment, schedule: str, expected: list[float]) -> None:
    recipe = changed(resolve(tiny, MOCHI, 0), schedule=schedule, epochs=10, lr=1.0).pretrain
    rates = [pretrain.learning_rate(recipe, epoch) for epoch in range(10)]
    assert rates[:2] == pytest.approx(expected)
    last = 0.5 * (1 + math.cos(0.9 * math.pi)) if schedule == "cosine" else 0.01
    assert rates[9] == pytest.approx(last)
    if schedule == "step":
        assert rates[5:9] == pytest.approx([1.0, 0.1, 0.1, 0.01])
