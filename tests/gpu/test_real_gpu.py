"""The stages on a real GPU, compared with the CPU: `make test-gpu`.

`test_simulated_gpu.py` covers devices and waits on any machine. Only a GPU shows whether its kernels are
deterministic, what they compute, and what the driver reports.
"""

import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.negatives import all_rules
from mochi import encoders
from mochi.config import Experiment, parse_experiment, probe_run
from mochi.contrast.loss import contrastive_loss
from mochi.contrast.negatives import SparseSynthetics, VectorSynthetics
from mochi.contrast.rules import Candidates, Rule
from mochi.data.format import open_dataset
from mochi.data.views.loading import Loading, two_views
from mochi.detection import stage as detection_stage
from mochi.detection.training import FineTuning
from mochi.encoders.batch_norm import GroupedBatchNorm2d
from mochi.encoders.files import save_encoder
from mochi.evaluation import stage as evaluation_stage
from mochi.pretraining import objectives
from mochi.pretraining import stage as pretraining_stage
from mochi.pretraining.loop import TrainState
from mochi.provenance.wanted import evaluated
from mochi.runtime import gpus, monitoring
from mochi.runtime.cuda_graphs import use_cuda_graph
from mochi.runtime.distributed import AveragedGradients
from mochi.runtime.ieee_float32 import use_ieee_float32
from tests.commands import run
from tests.detection.conftest import voc_image, voc_set  # noqa: F401 - fixtures
from tests.detection.sets import detection, small_set
from tests.gpu.runs import AUGMENTATIONS, METHOD, ROWS, experiment, pretrain
from tests.pretraining.runs import rows, steps_done

if not torch.cuda.is_available():
    pytest.skip("`make test-gpu` runs it, on a host with a GPU", allow_module_level=True)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    """Stages choose deterministic kernels, except detection."""
    torch.use_deterministic_algorithms(mode=False)
    use_ieee_float32()


@pytest.fixture
def no_waits() -> Iterator[Callable[[bool], None]]:
    """Switch whether a call that waits for the GPU is an error."""

    def switch(on: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does not yet detect everything
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stages find no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = found.detach().to("cpu", torch.float64) - expected.detach().to("cpu", torch.float64)
    return float(difference.norm() / expected.detach().to(torch.float64).norm())


@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_two_trainings_and_a_resumed_one_give_the_same_bytes(
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: str,
    storage: str,
    precision: str,
) -> None:
    chosen = experiment(storage, row, precision=precision, checkpoint_minutes=1e-9)
    expected = pretrain(chosen, data[storage], tmp_path / "first")
    assert pretrain(chosen, data[storage], tmp_path / "second") == expected
    wait, steps = AveragedGradients.wait, iter(range(100))

    def killed(gradients: AveragedGradients) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt
        wait(gradients)

    with monkeypatch.context() as patch:
        patch.setattr(AveragedGradients, "wait", killed)
        patch.setitem(monitoring.CHECK_INTERVAL, "cuda", 1)
        with pytest.raises(KeyboardInterrupt):
            pretrain(chosen, data[storage], tmp_path / "killed")
    assert steps_done(tmp_path / "killed" / "work" / "checkpoint.safetensors") > 0
    assert pretrain(chosen, data[storage], tmp_path / "killed", workers=2) == expected
    record = json.loads((tmp_path / "first" / "out" / "provenance.json").read_text())
    assert record["hardware"]["gpus"] == [torch.cuda.get_device_name(GPU)]
    assert record["precision"] == precision


@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_cuda_graphs_change_no_byte(
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    row: str,
    precision: str,
) -> None:
    chosen = experiment("pixels", row, precision=precision)
    expected = pretrain(chosen, data["pixels"], tmp_path / "graphs")
    assert "one by one" not in caplog.text
    monkeypatch.setattr(objectives, "use_cuda_graph", lambda *_: None)
    assert pretrain(chosen, data["pixels"], tmp_path / "one by one") == expected


def test_a_cuda_graph_serves_training_and_keeps_the_running_statistics() -> None:
    config = experiment("pixels").encoder
    replayed, launched = (
        encoders.build(config, partial(GroupedBatchNorm2d, num_groups=2), seed=0).to(GPU) for _ in range(2)
    )
    images = torch.randn(8, 3, 16, 16, device=GPU)
    use_cuda_graph(replayed, images)
    for name, buffer in launched.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], buffer), name
    for batch in (images, torch.randn_like(images)):
        outputs = [encoder(batch) for encoder in (replayed, launched)]
        gradients = [
            torch.autograd.grad(output.square().sum(), [*encoder.parameters()])
            for output, encoder in zip(outputs, (replayed, launched), strict=True)
        ]
        assert torch.equal(*outputs)
        assert all(map(torch.equal, *gradients))
    for name, buffer in launched.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], buffer), name
    few = images[:3]
    assert torch.equal(*(encoder.eval()(few) for encoder in (replayed, launched)))


@pytest.mark.parametrize("row", ["contrastive", "masks", "supervised"])
@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
def test_training_computes_what_the_cpu_computes(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, storage: str
) -> None:
    """The means over an epoch of a few steps. Mixing is left out: its draws differ between devices."""
    monkeypatch.setitem(ROWS, "contrastive", {})
    monkeypatch.setitem(ROWS, "masks", {"masks": ["class_oracle", "same_image"]})
    recipe: dict[str, Any] = {"epochs": 1, "matching_epochs": [0], "precision": "float32"}
    chosen = experiment(storage, row, lr=0.005, momentum=0.0, **recipe)
    pretrain(chosen, data[storage], tmp_path / "gpu")
    on_cpu(monkeypatch)
    pretrain(chosen, data[storage], tmp_path / "cpu")
    (found,), (expected,) = rows(tmp_path / "gpu"), rows(tmp_path / "cpu")
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
@pytest.mark.parametrize("augmentation", list(AUGMENTATIONS))
def test_a_training_step_never_waits(
    no_waits: Callable[[bool], None],
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    row: str,
    augmentation: str,
    deterministic: bool,
) -> None:
    """Between two checks of the loss.

    Left out are the first step, before which pixels are copied, and the last of an epoch, which ends with a
    check.
    """
    chosen = experiment(
        storage, row, augmentation, deterministic=deterministic, batch_size=8 if storage == "jpegs" else 16
    )
    steps = 9 if storage == "jpegs" else 10
    check, done = pretraining_stage._Session.check, pretraining_stage._Session.step_done
    watched = []

    def checked(session: Any, state: TrainState, *rest: Any) -> None:
        no_waits(False)
        check(session, state, *rest)

    def stepped(session: Any, state: TrainState) -> None:
        done(session, state)
        no_waits(0 < state.step < steps - 1)
        watched.append(state.step)

    monkeypatch.setattr(pretraining_stage._Session, "check", checked)
    monkeypatch.setattr(pretraining_stage._Session, "step_done", stepped)
    pretrain(chosen, data[storage], tmp_path)
    assert watched == [*range(1, steps + 1)] * 2


def test_a_wait_is_an_error_in_these_tests(no_waits: Callable[[bool], None]) -> None:
    no_waits(True)
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device=GPU).item()


SETTINGS = {"num_hardest": 64, "num_pair_synthetics": 32, "num_query_synthetics": 16, "num_interpolated": 8,
            "num_extrapolated": 8, "num_mixed": 8, "num_noisy": 8, "num_perturbed": 8,
            "num_adversarial": 8}  # fmt: skip


@pytest.mark.parametrize("name", sorted(all_rules(SETTINGS)))
@pytest.mark.parametrize("masked", [False, True])
def test_every_rule_has_the_loss_and_gradient_of_float64_on_the_cpu(name: str, masked: bool) -> None:
    """With the synthetics that the rule makes on the GPU. A CPU processes 64 queries at once."""
    rule = all_rules(SETTINGS)[name]
    draws = torch.Generator().manual_seed(0)
    vectors = [F.normalize(torch.randn(rows, 16, generator=draws), dim=-1) for rows in (48, 48, 512)]
    excluded = torch.rand(48, 512, generator=draws) < 0.2 if masked else None
    query, key, queue = (each.to(GPU) for each in vectors)
    similarity = query @ queue.T
    if excluded is not None:
        similarity = similarity.masked_fill(excluded.to(GPU), -torch.inf)
    generator = torch.Generator(GPU).manual_seed(1)
    made = rule.synthetics(Candidates(query, similarity, queue, masked, generator))
    assert sum(_count(each) for each in made) == rule.num_synthetics
    found = _loss_and_gradient(_fixed(rule, made, GPU, torch.float32), query, key, queue, excluded)
    doubles = [each.double() for each in vectors]
    expected = _loss_and_gradient(_fixed(rule, made, CPU, torch.float64), *doubles, excluded)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert relative(found[1], expected[1]) < 1e-5


def _count(synthetics: Any) -> int:
    vectors = isinstance(synthetics, VectorSynthetics)
    return int((synthetics.vectors if vectors else synthetics.parents).shape[1])


def _fixed(rule: Any, made: list[Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The rule with these synthetics instead of new ones."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    fixed = [type(each)(*map(moved, each)) for each in made]
    changes = {"synthetics": lambda *_: fixed, "makes_vectors": False}  # all queries at once
    kind = type(f"Fixed{type(rule).__name__}", (type(rule),), changes)
    return kind(**vars(rule))


def _loss_and_gradient(
    rule: Rule, query: Tensor, key: Tensor, queue: Tensor, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    query = query.detach().requires_grad_()
    mask = None if excluded is None else excluded.to(query.device)
    loss = contrastive_loss(query, key, queue, 0.2, rule, mask).loss
    return loss.detach(), torch.autograd.grad(loss, query)[0]


@pytest.mark.parametrize("size", [1024, 65536])
def test_synthetics_are_mixed_from_the_hardest_negatives(size: int) -> None:
    """A long queue selects them in two steps."""
    rule = all_rules(SETTINGS)["mochi"]
    draws = torch.Generator(GPU).manual_seed(0)
    query, queue = (
        F.normalize(torch.randn(rows, 64, generator=draws, device=GPU), dim=-1) for rows in (32, size)
    )
    similarity = query @ queue.T
    made = rule.synthetics(Candidates(query, similarity.clone(), queue, False, draws))
    least = similarity.topk(SETTINGS["num_hardest"]).values[:, -1:]
    for each in made:
        assert isinstance(each, SparseSynthetics)
        assert (similarity.gather(1, each.parents.flatten(1)) >= least).all()


@pytest.mark.parametrize("batch", [32, 30])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_grouped_batch_norm_computes_each_group_alone(batch: int, layout: torch.memory_format) -> None:
    grouped = GroupedBatchNorm2d(8, 4).to(GPU)
    images = torch.randn(batch, 8, 9, 9).to(memory_format=layout)
    found = images.to(GPU, copy=True).requires_grad_()
    weights = torch.randn(batch, 8, 9, 9)
    (grouped(found) * weights.to(GPU)).sum().backward()

    exact = images.double().requires_grad_()
    parts = [F.batch_norm(part, None, None, training=True) for part in exact.tensor_split(4)]
    (torch.cat(parts) * weights.double()).sum().backward()
    assert exact.grad is not None
    assert found.grad is not None
    assert relative(found.grad, exact.grad) < 1e-5
    assert relative(grouped(found), torch.cat(parts)) < 1e-5
    assert grouped.running_var is not None
    variances = [part.transpose(0, 1).flatten(1).var(1) for part in images.double().tensor_split(4)]
    mean = torch.stack(variances).mean(0)
    assert relative(grouped.running_var, 0.81 + 0.1 * 0.9 * mean + 0.1 * mean) < 1e-5


@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
@pytest.mark.parametrize("augmentation", list(AUGMENTATIONS))
def test_views_are_those_of_the_cpu(data: dict[str, Path], storage: str, augmentation: str) -> None:
    split = open_dataset(data[storage]).split("train")
    config = experiment(storage, augmentation=augmentation).augmentation
    batches = {
        device: next(iter(two_views(split, config, Loading(16, device), seed=0, epoch=0)))
        for device in (CPU, GPU)
    }
    for view in ("query", "key"):
        found, expected = (getattr(batches[device], view) for device in (GPU, CPU))
        assert relative(found, expected) < 1e-3, view
    assert batches[GPU].indices.tolist() == batches[CPU].indices.tolist()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_an_encoder_computes_what_the_cpu_computes(architecture: str) -> None:
    config = experiment("pixels").encoder.model_copy(update={"architecture": architecture, "width": 16})
    encoder = encoders.build(config, seed=0).eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = encoder.double()(images.double())
        found = encoder.float().to(GPU).to(memory_format=torch.channels_last)(images.to(GPU))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
@pytest.mark.parametrize("features_on", ["device", "host"])
@pytest.mark.parametrize(
    ("task", "protocol"),
    [
        ("linear", {}),
        ("linear", {"min_scale": 0.3}),
        ("knn", {}),
        ("few", {"task": "few_label", "images_per_class": 1, "samples": 1}),
    ],
    ids=["linear on features", "linear on crops", "knn", "few labels"],
)
def test_evaluations_score_as_on_the_cpu(
    data: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    features_on: str,
    task: str,
    protocol: dict[str, Any],
) -> None:
    """And the same twice. One of the few images may fall on the other side of a boundary."""
    content = experiment(storage, photos=photos).model_dump(mode="json", exclude_unset=True)
    content["evaluation"][task] = content["evaluation"].get(task, {}) | protocol
    content["evaluation"]["features_on"] = features_on
    chosen = parse_experiment(content, "tiny")
    weights = tmp_path / "encoder.safetensors"
    save_encoder(weights, encoders.build(chosen.encoder, seed=0))
    inputs = {"encoder": weights, "data": data[storage] / "manifest.json"}
    found = []
    for name in ("first", "second", "cpu"):
        if name == "cpu":
            on_cpu(monkeypatch)
        result = replace(evaluated(chosen, METHOD, 0, task), folder=tmp_path / name, inputs=inputs)
        evaluation_stage.run(probe_run(chosen, METHOD, 0, task), result, tmp_path / "work")
        found.append(json.loads((tmp_path / name / "metrics.json").read_text())["top1"])
    size = len(open_dataset(data[storage]).split("val"))
    assert found[0] == found[1]
    assert abs(found[0] - found[2]) <= 100 / size + 1e-9


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_a_detector_is_trained_and_evaluated(
    voc_set: Path,  # noqa: F811
    tiny: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    workers: int,
) -> None:
    losses: list[dict[str, Any]] = []
    check = FineTuning._check

    def checked(self: FineTuning, *arguments: Any) -> dict[str, float]:
        losses.append(check(self, *arguments))
        return losses[-1]

    monkeypatch.setattr(FineTuning, "_check", checked)
    chosen = small_set(voc_set, training={"mode": mode, "iterations": 4, "lr_drops": []})
    weights = tmp_path / "encoder.safetensors"
    save_encoder(weights, encoders.build(tiny.encoder, seed=0))
    arguments = detection(tiny, chosen, weights, tmp_path / "out")
    detection_stage.run(*arguments, tmp_path / "work", workers=workers)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(np.isfinite(list(each.values())).all() for each in losses)
    assert losses
    assert 0 <= metrics["AP50"] <= 100


def test_the_driver_and_this_process_name_the_same_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    names = gpus.visible()
    assert len(names) == torch.cuda.device_count()
    assert all(name in listed for name in names)
    for hidden in ("-1", "", "99"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpus.visible() == []
    for spelled in ("0", names[0], names[0][:12]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", spelled)
        assert gpus.visible() == names[:1]


def test_features_of_a_folder_are_those_of_the_cpu(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, images = tmp_path / "encoder.safetensors", str(photos / "val")
    save_encoder(weights, encoders.build(experiment("pixels").encoder, seed=0))
    sizes = ("--architecture", "resnet10", "--stem", "half", "--width", "8", "--image-size", "16")
    found = []
    for device in ("gpu", "cpu"):
        if device == "cpu":
            on_cpu(monkeypatch)
        out = tmp_path / f"{device}.npz"
        done = run("features", "--encoder", str(weights), "--images", images, "--out", str(out), *sizes)
        assert done.returncode == 0, done.stderr
        with np.load(out) as written:
            (name,) = (each for each in written if written[each].shape == (8, 64))
            found.append(torch.from_numpy(written[name]))
    assert relative(*found) < 1e-5


def test_running_out_of_memory_is_one_line() -> None:
    torch.cuda.set_per_process_memory_fraction(1e-5, GPU)
    torch.cuda.empty_cache()
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError) as error:
            torch.empty(1 << 30, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    advice = str(gpus.reason(error.value))
    assert "expected room for the weights and one batch" in advice
    assert "\n" not in advice
