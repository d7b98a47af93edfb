"""Every stage on a simulated GPU: no operands on two devices, and no waiting within a step.

CPU tensors that report to be on a GPU (`tests.simulated_gpu`) pass through the real code. A forgotten
`.to(device)` raises `DeviceError`.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mochi import encoders
from mochi.analysis import stage as analysis_stage
from mochi.cli import _set_up_process
from mochi.config import Experiment, analysis_run, parse_experiment, pretrain_run, probe_run
from mochi.data.views import loading
from mochi.detection import stage as detection_stage
from mochi.detection.batches import Images
from mochi.detection.sets import read_splits
from mochi.detection.training import FineTuning, FrozenBackbone, Recipe
from mochi.encoders.files import save_encoder, write_tensors
from mochi.encoders.heads import projection_head
from mochi.evaluation import stage as evaluation_stage
from mochi.evaluation.features import Features, Frozen
from mochi.pretraining import stage as pretraining_stage
from mochi.pretraining.loop import TrainState
from mochi.provenance.wanted import analyzed, evaluated
from mochi.runtime import monitoring
from mochi.runtime.distributed import AveragedGradients
from tests.commands import run
from tests.detection.conftest import encoder_file, voc_image, voc_set  # noqa: F401 - fixtures
from tests.detection.sets import ENCODER, detection, small_set, voc_object
from tests.gpu.runs import AUGMENTATIONS, METHOD, ROWS, experiment, pretrain
from tests.pretraining.runs import result_in, steps_done
from tests.processes import run_ranks
from tests.simulated_gpu import DeviceError, SimulatedGpu, device_of, simulated_gpu


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as mode:
        yield mode


@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
@pytest.mark.parametrize("augmentation", list(AUGMENTATIONS))
def test_pretraining_never_mixes_devices(
    gpu: SimulatedGpu, data: dict[str, Path], tmp_path: Path, storage: str, row: str, augmentation: str
) -> None:
    pretrain(experiment(storage, row, augmentation), data[storage], tmp_path)
    with (tmp_path / "out" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    written = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert written["hardware"]["gpus"] == ["simulated"]
    assert written["precision"] == "bfloat16"


_FEW = dict.fromkeys(
    ("num_interpolated", "num_extrapolated", "num_mixed", "num_noisy", "num_perturbed", "num_adversarial"),
    4,
)


@pytest.mark.parametrize(
    ("negatives", "optimizer"),
    [
        ({"rule": "synco", "num_hardest": 16, "warmup_epochs": 1, **_FEW}, "adamw"),
        ({"rule": "hard_weighting"}, "lars"),
        ({"rule": "debiased"}, "sgd"),
        ({"rule": "decoupled"}, "sgd"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["rule"],
)
def test_no_rule_or_optimizer_mixes_devices(
    gpu: SimulatedGpu,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    negatives: dict[str, Any],
    optimizer: str,
) -> None:
    monkeypatch.setitem(ROWS, "rule", {"negatives": negatives})
    pretrain(experiment("pixels", "rule", optimizer=optimizer), data["pixels"], tmp_path)
    assert (tmp_path / "out" / "encoder.safetensors").exists()


def test_an_analysis_never_mixes_devices(gpu: SimulatedGpu, data: dict[str, Path], tmp_path: Path) -> None:
    chosen = experiment("pixels")
    weights, head = tmp_path / "encoder.safetensors", tmp_path / "head.safetensors"
    save_encoder(weights, encoders.build(chosen.encoder, seed=0))
    write_tensors(head, projection_head(64, 16, "mlp").state_dict(), None)
    inputs = {"encoder": weights, "head": head, "data": data["pixels"] / "manifest.json"}
    result = replace(analyzed(chosen, METHOD, 0), folder=tmp_path / "out", inputs=inputs)
    analysis_stage.run(analysis_run(chosen, METHOD, 0), result)
    spaces = json.loads((tmp_path / "out" / "analysis.json").read_text())["spaces"]
    assert set(spaces) == {"pooled", "embedded"}


def test_a_folder_is_encoded_by_the_kernels_of_an_evaluation(
    gpu: SimulatedGpu, tiny: Experiment, photos: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "encoder.safetensors"
    save_encoder(weights, encoders.build(tiny.encoder, seed=0))
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    folder, out = str(photos / "val"), str(tmp_path / "features.npz")
    sizes = ("--architecture", "resnet10", "--stem", "half", "--width", "8", "--image-size", "16")
    done = run("features", "--encoder", str(weights), "--images", folder, "--out", out, *sizes)
    assert done.returncode == 0, done.stderr
    with np.load(out) as written:
        assert any(written[name].shape == (8, 64) for name in written)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("storage", "workers", "warned"), [("jpegs", 0, 1), ("jpegs", 1, 0), ("pixels", 0, 0)]
)
def test_a_gpu_that_will_wait_for_images_is_a_warning(
    gpu: SimulatedGpu,
    data: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    storage: str,
    workers: int,
    warned: int,
) -> None:
    pretrain(experiment(storage, "supervised", epochs=1), data[storage], tmp_path, workers)
    assert caplog.text.count("the GPU waits for one core; pass --workers N") == warned


@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
def test_a_resumed_training_ends_with_the_same_bytes(
    gpu: SimulatedGpu,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
) -> None:
    chosen = experiment(storage, checkpoint_minutes=1e-9)
    expected = pretrain(chosen, data[storage], tmp_path / "whole")
    wait, steps = AveragedGradients.wait, iter(range(100))

    def killed(gradients: AveragedGradients) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt
        wait(gradients)

    monkeypatch.setattr(AveragedGradients, "wait", killed)
    monkeypatch.setitem(monitoring.CHECK_INTERVAL, "cuda", 1)
    with pytest.raises(KeyboardInterrupt):
        pretrain(chosen, data[storage], tmp_path / "killed")
    monkeypatch.undo()
    assert steps_done(tmp_path / "killed" / "work" / "checkpoint.safetensors") > 0
    assert pretrain(chosen, data[storage], tmp_path / "killed", workers=2) == expected


@pytest.mark.parametrize("row", ["contrastive", "supervised"])
def test_the_same_workers_load_all_epochs(
    gpu: SimulatedGpu, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    workers_of_loaders, real = [], loading.DataLoader

    def counted(*arguments: Any, **options: Any) -> Any:
        workers_of_loaders.append(options["num_workers"])
        return real(*arguments, **options)

    monkeypatch.setattr(loading, "DataLoader", counted)
    pretrain(experiment("jpegs", row), data["jpegs"], tmp_path, workers=1)
    assert workers_of_loaders == [1]


@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
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
@pytest.mark.parametrize("features_on", ["device", "host"])
def test_evaluations_never_mix_devices(
    gpu: SimulatedGpu,
    data: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    storage: str,
    features_on: str,
    task: str,
    protocol: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With features on either device: they stay on the GPU if they fill at most half of its free memory."""
    free = 1 << 30 if features_on == "device" else 1 << 10
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 << 30))
    places, extract = set(), Frozen.features_of

    def watched(self: Frozen, *arguments: Any) -> Features:
        found = extract(self, *arguments)
        places.update({found.values.device.type, found.labels.device.type})
        return found

    monkeypatch.setattr(Frozen, "features_of", watched)
    chosen = experiment(storage, photos=photos)
    content = chosen.model_dump(mode="json", exclude_unset=True)
    content["evaluation"][task] = content["evaluation"].get(task, {}) | protocol
    chosen = parse_experiment(content, "tiny")
    weights = tmp_path / "encoder.safetensors"
    save_encoder(weights, encoders.build(chosen.encoder, seed=0))
    inputs = {"encoder": weights, "data": data[storage] / "manifest.json"}
    result = replace(evaluated(chosen, METHOD, 0, task), folder=tmp_path / "out", inputs=inputs)
    evaluation_stage.run(probe_run(chosen, METHOD, 0, task), result, tmp_path / "work")
    assert 0 <= json.loads((tmp_path / "out" / "metrics.json").read_text())["top1"] <= 100
    assert places == {"cuda" if features_on == "device" else "cpu"}


@pytest.mark.usefixtures("gpu")
def test_every_stage_computes_in_ieee_float32() -> None:
    """Detection too, which does not choose deterministic kernels."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    conv.fp32_precision = matmul.fp32_precision = "tf32"
    _set_up_process(1)
    assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_detection_never_mixes_devices(
    gpu: SimulatedGpu,
    tiny: Experiment,
    voc_image: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    mode: str,
) -> None:
    for index in range(2):
        voc_image(voc_object("square", (3 + index, 4, 20 + index, 22)), name=f"a{index}")
        root = voc_image(voc_object("bar", (5, 25, 40, 36)), name=f"b{index}", image_set="test")
    weights = tmp_path / "weights.safetensors"
    save_encoder(weights, encoders.build(tiny.encoder, seed=0))
    chosen = small_set(root, training={"mode": mode, "iterations": 2, "lr_drops": []})
    detection_stage.run(*detection(tiny, chosen, weights, tmp_path / "out"), tmp_path / "work")
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_a_detection_step_waits_only_for_the_sampling_of_anchors_and_regions(
    gpu: SimulatedGpu,
    voc_set: Path,  # noqa: F811
    encoder_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    workers: int,
) -> None:
    """torchvision's proposals and heads select by value. Losses are read every 20 steps."""
    chosen = small_set(voc_set, training={"mode": mode, "iterations": 25, "lr_drops": []})
    train, _ = read_splits(chosen.data, masks=False)
    recipe = Recipe(chosen, ENCODER, encoder_file, 2, torch.device("cuda", 0), workers)
    images = Images(train)
    frozen = FrozenBackbone(recipe, images) if mode == "frozen" else None
    tuning = FineTuning(recipe, images, 0.02, 25, 0, tmp_path / "saved", {}, frozen)
    advance, check = FineTuning._advance, FineTuning._check
    waits: list[Counter[str]] = []
    looked: list[int] = []

    def stepped(self: FineTuning, batches: Any) -> dict[str, torch.Tensor]:
        gpu.waits.clear()
        losses = advance(self, batches)
        waits.append(gpu.waits.copy())
        return losses

    def checked(self: FineTuning, sums: Any, steps: int) -> dict[str, float]:
        looked.append(steps)
        return check(self, sums, steps)

    monkeypatch.setattr(FineTuning, "_advance", stepped)
    monkeypatch.setattr(FineTuning, "_check", checked)
    rows: list[dict[str, Any]] = []
    tuning.train("on a GPU", rows.append)
    assert looked == [20, 5]
    assert [row["step"] for row in rows] == [20, 25]
    assert len(waits) == 25
    places = {wait.rpartition(" ")[2].partition(":")[0] for each in waits for wait in each}
    assert places == {"detection/model.py"}


def test_the_simulated_gpu_refuses_what_a_gpu_refuses(gpu: SimulatedGpu) -> None:
    """It also counts waits: otherwise the tests above could not fail."""
    device = torch.device("cuda", 0)
    on_gpu, on_cpu = torch.ones(3, device=device), torch.ones(3)
    generator = torch.Generator(device)
    refused: list[Callable[[], object]] = [
        lambda: on_gpu + on_cpu,
        lambda: torch.mm(on_gpu[None], on_cpu[:, None]),
        lambda: on_cpu[on_gpu.long()],
        lambda: torch.rand(3, generator=generator),
        lambda: torch.rand(3, generator=torch.Generator(), device=device),
        on_gpu.numpy,
        lambda: torch.cat((on_gpu, torch.from_numpy(np.ones(3, np.float32)))),
        lambda: on_cpu.add_(on_gpu),
    ]
    for call in refused:
        with pytest.raises((DeviceError, TypeError)):
            call()
    assert not gpu.waits
    legal: list[Callable[[], object]] = [
        lambda: on_gpu + torch.tensor(2.0),
        lambda: torch.rand(3, generator=generator, device=device),
        lambda: on_cpu.pin_memory().to(device, non_blocking=True) + on_gpu,
    ]
    for call in legal:
        call()
    assert not gpu.waits
    waits: list[Callable[[], object]] = [
        lambda: on_gpu.sum().item(),
        lambda: bool(on_gpu[0] > 0),
        lambda: on_gpu[on_cpu > 0],
        lambda: on_cpu.to(device),
        lambda: on_cpu.to(device, non_blocking=True),  # not pinned
        on_gpu.cpu,
        lambda: torch.tensor([1.0], device=device),
        on_gpu.nonzero,
    ]
    for number, call in enumerate(waits, start=1):
        call()
        assert gpu.waits.total() == number
    weight = on_gpu.clone().requires_grad_()
    (weight * 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.device == device


@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("storage", ["pixels", "jpegs"])
@pytest.mark.parametrize("augmentation", list(AUGMENTATIONS))
def test_a_training_step_never_waits(
    gpu: SimulatedGpu,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    row: str,
    augmentation: str,
) -> None:
    """Between two checks of the loss, including the loading of batches.

    The first step is left out, before which pixels are copied to the GPU, and so is the last of an epoch,
    which ends with a check.
    """
    chosen = experiment(storage, row, augmentation, batch_size=8 if storage == "jpegs" else 16)
    steps = 9 if storage == "jpegs" else 10
    waits: list[Counter[str]] = []
    copies: list[int] = []
    check, done = pretraining_stage._Session.check, pretraining_stage._Session.step_done

    def checked(session: Any, state: TrainState, *rest: Any) -> None:
        check(session, state, *rest)
        gpu.waits.clear()
        gpu.copies.clear()

    def stepped(session: Any, state: TrainState) -> None:
        done(session, state)
        if 1 < state.step < steps:
            waits.append(gpu.waits.copy())
            copies.append(gpu.copies.total())
        gpu.waits.clear()
        gpu.copies.clear()

    monkeypatch.setattr(pretraining_stage._Session, "check", checked)
    monkeypatch.setattr(pretraining_stage._Session, "step_done", stepped)
    pretrain(chosen, data[storage], tmp_path)
    assert len(waits) == 2 * (steps - 2)
    assert not sum(waits, Counter())
    # For each view its crop windows and its parameters or pixels; the rows, the labels, the shuffle and
    # its inverse.
    assert max(copies) <= (4 if row == "supervised" else 9)


def train_and_evaluate(data: Path, photos: Path, folder: Path) -> None:
    """What each of two ranks runs: NCCL takes only contiguous tensors on a GPU."""

    def as_nccl(collective: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **options: Any) -> Any:
            for tensor in (each for each in arguments if isinstance(each, torch.Tensor)):
                assert device_of(tensor) == "cuda", tensor.shape
                assert tensor.is_contiguous(), tensor.stride()
            return collective(*arguments, **options)

        return checked

    for name in ("all_gather", "all_reduce", "all_to_all_single"):
        setattr(torch.distributed, name, as_nccl(getattr(torch.distributed, name)))
    for stage in (pretraining_stage, evaluation_stage.distributed):
        stage.process_group = lambda device: nullcontext()  # type: ignore[attr-defined]
    chosen = experiment("jpegs", photos=photos)
    with simulated_gpu():
        result = result_in(folder, chosen, data, METHOD)
        pretraining_stage.run(pretrain_run(chosen, METHOD, 0), result, folder / "work")
        inputs = {"encoder": folder / "out" / "encoder.safetensors", "data": data / "manifest.json"}
        torch.distributed.barrier()  # rank 0 has written the encoder
        result = replace(evaluated(chosen, METHOD, 0, "knn"), folder=folder / "knn", inputs=inputs)
        evaluation_stage.run(probe_run(chosen, METHOD, 0, "knn"), result, folder / "work")


def test_ranks_exchange_tensors_that_nccl_takes(
    data: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run_ranks(train_and_evaluate, 2, data["jpegs"], photos, tmp_path)
    assert (tmp_path / "knn" / "metrics.json").exists()
