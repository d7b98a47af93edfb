"""A resumed fine-tuning compared with an uninterrupted one, byte by byte; accumulation with one large
batch; the schedule with detectron2's numbers; the optimizer with its update written out.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi.config import ConfigError, DetectionSet, DetectionTraining
from mochi.detection.annotations import for_training
from mochi.detection.batches import Images, collate
from mochi.detection.sets import read_splits
from mochi.detection.training import FineTuning, FrozenBackbone, Recipe, Schedule, accumulation, seed_step
from mochi.runtime import distributed
from mochi.runtime.monitoring import CHECK_INTERVAL, NonFiniteError
from mochi.storage.checkpoint import CheckpointError
from tests.detection.sets import ENCODER, small_set
from tests.processes import run_ranks

CPU = torch.device("cpu")


def tuning(
    chosen: DetectionSet, encoder_file: Path, saved: Path, *, seed: int = 0, lr: float = 0.02,
    workers: int = 0, **more: Any
) -> FineTuning:  # fmt: skip
    train, _ = read_splits(chosen.data, masks=False)
    recipe = Recipe(chosen, ENCODER, encoder_file, len(train.classes), CPU, workers)
    images = Images(for_training(train, "keep"))
    frozen = FrozenBackbone(recipe, images) if chosen.training.mode == "frozen" else None
    return FineTuning(recipe, images, lr, chosen.training.iterations, seed, saved, more, frozen)


def state(run: FineTuning) -> dict[str, torch.Tensor]:
    return {name: value.contiguous().clone() for name, value in run.detector.state_dict().items()}


@pytest.mark.parametrize(
    ("mode", "workers"), [("finetune", 0), ("finetune", 2), ("frozen", 0), ("frozen", 2)]
)
def test_a_resumed_fine_tuning_ends_with_the_same_bytes(
    voc_set: Path, encoder_file: Path, tmp_path: Path, mode: str, workers: int
) -> None:
    chosen = small_set(voc_set, training={"mode": mode})
    straight = tuning(chosen, encoder_file, tmp_path / "a.safetensors")
    straight.train("straight")
    # The checkpoint of the second step, as a kill during the third would leave it.
    saved = tmp_path / "b.safetensors"
    first = tuning(chosen, encoder_file, saved)
    first.train("first", lambda row: first.save() if row["step"] == 2 else None)
    torch.manual_seed(99)
    resumed = tuning(chosen, encoder_file, saved, workers=workers)
    assert resumed.step == 2
    resumed.train("resumed")
    expected = state(straight)
    for name, value in state(resumed).items():
        assert torch.equal(value, expected[name]), name
    other = tuning(chosen, encoder_file, tmp_path / "c.safetensors", seed=1)
    other.train("other seed")
    assert not torch.equal(state(other)["heads.box_predictor.cls_score.weight"],
                           expected["heads.box_predictor.cls_score.weight"])  # fmt: skip


def test_statistics_are_recomputed_on_the_next_batches(
    voc_set: Path, encoder_file: Path, tmp_path: Path
) -> None:
    """With one batch they are the statistics of that batch, not the moving average of earlier steps."""
    run = tuning(small_set(voc_set, training={"precise_bn_batches": 1}), encoder_file, tmp_path / "x")
    run.train("recomputed")
    again = copy.deepcopy(run.detector).train()
    layers = {
        name: module for name, module in again.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    }
    for layer in layers.values():
        layer.momentum = 1.0
    batch = collate(run._dataset[4])
    seed_step(0, 4)
    with torch.no_grad():
        again(batch.images(CPU), batch.sizes, batch.targets(CPU))
    for name, layer in layers.items():
        recomputed = run.detector.get_submodule(name)
        torch.testing.assert_close(recomputed.running_mean, layer.running_mean)
        torch.testing.assert_close(recomputed.running_var, layer.running_var)


def test_the_optimizer_is_sgd_with_momentum_without_weight_decay_of_norms(
    voc_set: Path, encoder_file: Path, tmp_path: Path
) -> None:
    """Two steps with all gradients 1, against the update written out."""
    training = {"momentum": 0.8, "weight_decay": 0.25}
    run = tuning(small_set(voc_set, training=training), encoder_file, tmp_path / "x")
    norms = {
        f"{name}.{kind}"
        for name, module in run.detector.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    expected = {}
    for name, parameter in run.detector.named_parameters():
        parameter.data += 1  # biases start at 0, which weight decay does not change
        parameter.grad = torch.ones_like(parameter)
        decay = 0.0 if name in norms else 0.25
        velocity = 1 + decay * parameter.detach()
        moved = parameter.detach() - 0.5 * velocity
        expected[name] = moved - 0.5 * (0.8 * velocity + 1 + decay * moved)
    for group in run._optimizer.param_groups:
        group["lr"] = 0.5
    for _ in range(2):
        run._optimizer.step()
    assert len(norms) > 10
    for name, parameter in run.detector.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_checkpoint_bytes_is_the_size_of_a_checkpoint(
    voc_set: Path, encoder_file: Path, tmp_path: Path, mode: str
) -> None:
    run = tuning(small_set(voc_set, training={"mode": mode}), encoder_file, tmp_path / "x")
    batches = run._remaining()
    run._advance(batches)
    run.save()
    tensors = sum(tensor.nbytes for tensor in load_file(tmp_path / "x").values())
    assert run._recipe.checkpoint_bytes() == tensors


def test_a_checkpoint_of_another_run_is_refused(voc_set: Path, encoder_file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "x.safetensors"
    tuning(small_set(voc_set), encoder_file, saved, lr=0.02).save()
    with pytest.raises(CheckpointError, match=r"lr=0\.02.*lr=0\.03"):
        tuning(small_set(voc_set), encoder_file, saved, lr=0.03)


def test_a_frozen_backbone_does_not_change(voc_set: Path, encoder_file: Path, tmp_path: Path) -> None:
    weights = load_file(encoder_file)
    frozen = tuning(small_set(voc_set, training={"mode": "frozen"}), encoder_file, tmp_path / "a")
    frozen.train("frozen")
    moved = tuning(small_set(voc_set), encoder_file, tmp_path / "b")
    moved.train("finetune")
    for name in weights:
        if not name.startswith("layer4") and not name.endswith(("running_mean", "running_var", "tracked")):
            assert torch.equal(frozen.detector.backbone.state_dict()[name], weights[name]), name
    for name in ("conv1.weight", "layer3.0.conv2.weight", "bn1.running_mean"):
        assert not torch.equal(moved.detector.backbone.state_dict()[name], weights[name]), name


def test_a_frozen_backbone_is_normalised_on_the_set(
    voc_set: Path, encoder_file: Path, tmp_path: Path
) -> None:
    """The statistics of a random encoder are 0 and 1; recomputed ones give its layers unit variance."""
    training = {"mode": "frozen", "precise_bn_batches": 12, "train_sizes": [32], "flip": False}
    run = tuning(small_set(voc_set, training=training), encoder_file, tmp_path / "x")
    assert run._frozen is not None
    images = torch.cat([collate(run._dataset[number]).images(CPU) for number in range(3)])
    seen: list[torch.Tensor] = []
    run._frozen.module.layer2[0].bn2.register_forward_hook(
        lambda _, __, output: seen.append(output.clone())
    )
    with torch.no_grad():
        run._frozen.module(images)
    assert seen[0].var((0, 2, 3)).mean() == pytest.approx(1, abs=0.2)
    assert seen[0].mean((0, 2, 3)).abs().mean() < 0.15


@pytest.mark.parametrize("sizes", [[40], [32, 40]], ids=["one size", "two sizes"])
def test_cached_features_equal_computed_ones(
    voc_set: Path, encoder_file: Path, tmp_path: Path, sizes: list[int]
) -> None:
    """Features are cached for images without padding, for each size that they were used with."""
    chosen = small_set(voc_set, training={"mode": "frozen", "train_sizes": sizes, "micro_batch": 1})
    kept = tuning(chosen, encoder_file, tmp_path / "a")
    kept.train("kept")
    assert kept._frozen is not None
    assert 0 < len(kept._frozen._cached) <= 12 * len(sizes)  # six images, each with two sides
    again = tuning(chosen, encoder_file, tmp_path / "b")
    assert again._frozen is not None
    again._images.of_one_size = False
    again.train("computed")
    assert len(again._frozen._cached) == 0
    for name, value in state(again).items():
        torch.testing.assert_close(value, state(kept)[name], rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_training(
    voc_set: Path, encoder_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match="step"):
        tuning(small_set(voc_set, training={"iterations": 40, "lr_drops": []}), encoder_file,
               tmp_path / "x", lr=1e9).train("diverges")  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(
    voc_set: Path, encoder_file: Path, tmp_path: Path, value: float
) -> None:
    """The loss of the step that ruins them is still finite, and there may be no later step."""
    saved = tmp_path / "x.safetensors"
    run = tuning(small_set(voc_set, training={"checkpoint_minutes": 1e-9}), encoder_file, saved)
    steps = run._optimizer.step

    def ruined() -> None:
        steps()
        if run.step == 3:  # the last of four
            run.detector.backbone.conv1.weight.data[0, 0, 0, 0] = value

    run._optimizer.step = ruined  # type: ignore[method-assign, assignment]
    with pytest.raises(
        NonFiniteError, match=f"norm of the parameters is .* at step 3 .*Last good checkpoint: {saved}"
    ):
        run.train("ruined")
    resumed = tuning(small_set(voc_set, training={"checkpoint_minutes": 1e-9}), encoder_file, saved)
    assert resumed.step == 3
    assert all(tensor.isfinite().all() for tensor in state(resumed).values())


def paper_training(**changes: object) -> DetectionTraining:
    values = {
        "mode": "finetune", "seeds": [0], "lr": [0.02], "lr_batch_size": 16, "batch_size": 16,
        "micro_batch": 2, "iterations": 24000, "warmup_iterations": 100, "schedule": "step",
        "lr_drops": [18000, 22000], "momentum": 0.9, "weight_decay": 1e-4, "train_sizes": [800],
        "test_size": 800, "max_size": 1333, "flip": True, "precise_bn_batches": 200,
    }  # fmt: skip
    return DetectionTraining.model_validate({**values, **changes})


def test_the_schedule_is_detectron2s() -> None:
    schedule = Schedule.of(paper_training(), 0.02, 24000)
    rates = {0: 0.02e-3, 50: 0.02 * (0.5 + 0.5e-3), 100: 0.02, 17999: 0.02, 18000: 0.002, 22000: 0.0002}
    for step, rate in rates.items():
        assert schedule.lr_at(step) == pytest.approx(rate), step
    cosine = Schedule.of(paper_training(schedule="cosine", lr_drops=[]), 0.02, 24000)
    assert cosine.lr_at(12000) == pytest.approx(0.01)
    assert cosine.lr_at(23999) < 1e-7


@pytest.mark.parametrize("batch_size", [2, 8, 16, 64])
def test_rate_per_image_and_images_seen_do_not_depend_on_the_batch(batch_size: int) -> None:
    schedule = Schedule.of(paper_training(batch_size=batch_size, micro_batch=1), 0.02, 24000)
    assert schedule.lr / batch_size == pytest.approx(0.02 / 16)
    assert schedule.steps * batch_size == 24000 * 16
    assert schedule.drops[0] * batch_size == 18000 * 16


def test_scaled_steps_are_rounded_and_at_least_one() -> None:
    """With batches of 64 every number is a quarter; the search is a share of the training."""
    quarter = paper_training(
        batch_size=64, iterations=27, warmup_iterations=7, lr_drops=[11, 23], search_iterations=1
    )
    assert Schedule.of(quarter, 0.02, 27) == Schedule(7, 2, (3, 6), False, 0.08)
    assert Schedule.of(quarter, 0.02, 1).steps == 1


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "expected"), [(2, 8, 1), (8, 2, 1), (2, 1, 8), (16, 1, 1)]
)
def test_accumulation_replaces_missing_processes(micro_batch: int, world_size: int, expected: int) -> None:
    assert accumulation(paper_training(micro_batch=micro_batch), world_size) == expected


def test_a_batch_that_cannot_be_split_is_refused_with_valid_sizes() -> None:
    with pytest.raises(ConfigError, match=r"16 cannot be shared by 4 processes .* can be 1, 2, 4"):
        accumulation(paper_training(micro_batch=8), 4)


def _gradients(run: FineTuning) -> dict[str, torch.Tensor]:
    """Gradients of one step, with fixed batch-norm statistics so that images are independent."""
    run._set_modes = run.detector.eval  # type: ignore[method-assign]
    for module in run.detector.modules():
        if not isinstance(module, torch.nn.BatchNorm2d):
            module.training = True
    run._advance(iter([collate(run._dataset[n]) for n in run._numbers(0, run._accumulate)]))
    return {name: p.grad.clone() for name, p in run.detector.named_parameters() if p.grad is not None}


def test_accumulated_micro_batches_give_the_same_step(
    voc_set: Path, encoder_file: Path, tmp_path: Path
) -> None:
    """Losses are means over a micro-batch, so a step of 2 x 1 is the mean of two steps of 1."""
    training = {"flip": False, "train_sizes": [40], "batch_size": 2, "micro_batch": 1}
    model = {"rpn_batch": 4000, "roi_batch": 4000}  # all are sampled, so nothing is random
    both = _gradients(
        tuning(small_set(voc_set, training=training, model=model), encoder_file, tmp_path / "a")
    )
    parts = []
    for number in (0, 1):
        single = small_set(voc_set, training={**training, "batch_size": 1, "lr_batch_size": 1}, model=model)
        one = tuning(single, encoder_file, tmp_path / "b")
        one._numbers = lambda first, last, number=number: range(number, number + 1)  # type: ignore[method-assign]
        parts.append(_gradients(one))
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("interval", "logged"), [(1, [1, 2, 3, 4]), (3, [3, 4])])
def test_a_training_equals_its_steps_written_out(
    voc_set: Path,
    encoder_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interval: int,
    logged: list[int],
) -> None:
    """SGD with momentum, weight decay of all but batch norms, and two micro-batches a step."""
    monkeypatch.setitem(CHECK_INTERVAL, "cpu", interval)
    chosen = small_set(voc_set, training={"micro_batch": 1, "weight_decay": 0.1})
    run, plain = (tuning(chosen, encoder_file, tmp_path / name) for name in ("run", "plain"))
    rows: list[dict[str, Any]] = []
    run.train("run", rows.append)
    detector = plain.detector.train()
    norms = {
        id(p) for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()
    }
    weights = list(detector.parameters())
    velocities = [torch.zeros_like(weight) for weight in weights]
    since: list[dict[str, float]] = []  # losses of the steps after the last row
    for step in range(4):
        seed_step(0, step)
        batches = [collate(plain._dataset[number]) for number in (2 * step, 2 * step + 1)]
        losses = [detector(batch.images(CPU), batch.sizes, batch.targets(CPU)) for batch in batches]
        means = {name: (losses[0][name] + losses[1][name]) / 2 for name in losses[0]}
        total = torch.stack(list(means.values())).sum()
        gradients = torch.autograd.grad(total, weights)
        lr = plain._schedule.lr_at(step)
        since.append({"loss": total.item()} | {name: loss.item() for name, loss in means.items()})
        if step + 1 in logged:
            expected = {name: sum(each[name] for each in since) / len(since) for name in since[0]}
            assert rows.pop(0) == pytest.approx({"step": step + 1, "lr": lr} | expected, rel=1e-3)
            since.clear()
        with torch.no_grad():
            for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
                decay = 0.0 if id(weight) in norms else 0.1
                velocity.mul_(0.9).add_(gradient + decay * weight)
                weight.sub_(lr * velocity)
    assert not rows
    for (name, found), weight in zip(run.detector.named_parameters(), weights, strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-2, atol=1e-4, msg=name)


def _train_rank(voc_set: Path, encoder_file: Path, out: Path) -> None:
    """Uninterrupted, and resumed from the second step with workers."""
    chosen = small_set(voc_set, training={"micro_batch": 1})
    run = tuning(chosen, encoder_file, out / "saved")
    run.train("rank", lambda row: run.save() if row["step"] == 2 else None)
    save_file(state(run), out / f"{distributed.rank()}.safetensors")
    distributed.barrier()
    resumed = tuning(chosen, encoder_file, out / "saved", workers=1)
    assert resumed.step == 2
    resumed.train("resumed")
    for name, value in state(resumed).items():
        assert torch.equal(value, state(run)[name]), name


def test_two_processes_stay_equal_and_resume(voc_set: Path, encoder_file: Path, tmp_path: Path) -> None:
    run_ranks(_train_rank, 2, voc_set, encoder_file, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    before = load_file(encoder_file)["conv1.weight"]
    assert not torch.equal(first["backbone.conv1.weight"], before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
