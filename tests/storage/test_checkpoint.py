"""A loaded checkpoint equals the saved one, only its own run loads it, and damage is detected."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mochi.storage import checkpoint
from mochi.storage.checkpoint import CheckpointError

RUN = {"method": "moco-v2", "pretrain": {"lr": 0.1, "epochs": 2}}
STATE = {"epoch": 3, "rows": [{"loss": 0.1 + 0.2}]}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), value), "count": torch.tensor(7)}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    assert checkpoint.load(path, RUN) is None
    checkpoint.save(path, tensors(0.1), STATE, RUN)
    loaded = checkpoint.load(path, RUN)
    assert loaded is not None
    assert loaded[1] == STATE
    for name, value in tensors(0.1).items():
        assert torch.equal(loaded[0][name], value)
    checkpoint.discard(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["save", "discard"])
def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path, end: str) -> None:
    """Those of safetensors, and those of a process on another host."""
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, tensors(0), STATE, RUN)
    own = {item.name for item in tmp_path.iterdir()}
    for name in (
        ".tmpk3Jx9Q",
        ".last.safetensors.node7.4711.tmp",
        ".previous-last.safetensors.node7.4711.tmp",
    ):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    if end == "save":
        checkpoint.save(path, tensors(1), STATE, RUN)
        own.add("previous-last.safetensors")
    else:
        checkpoint.discard(path)
        own = set()
    assert {item.name for item in tmp_path.iterdir()} == own | {"notes.txt"}


def test_a_checkpoint_of_another_run_is_refused_and_both_are_named(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, tensors(0), STATE, RUN)
    other = {"method": "moco-v2", "pretrain": {"lr": 0.3, "epochs": 2}}
    with pytest.raises(CheckpointError, match=r"pretrain\.lr=0\.1; this is the run with pretrain\.lr=0\.3"):
        checkpoint.load(path, other)
    assert path.exists()


@pytest.mark.parametrize("damage", [b"", b"\x00" * 50])
def test_a_corrupt_file_falls_back_to_the_previous_one(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, tensors(1), {"epoch": 1}, RUN)
    checkpoint.save(path, tensors(2), {"epoch": 2}, RUN)
    content = path.read_bytes()
    path.unlink()  # the previous checkpoint is a hard link to the same file, and must stay
    path.write_bytes(damage or content[: len(content) // 2])
    loaded = checkpoint.load(path, RUN)
    assert loaded is not None
    assert loaded[1] == {"epoch": 1}
    assert torch.equal(loaded[0]["weight"], torch.full((2, 3), 1.0))
    assert "is corrupt" in caplog.text
    checkpoint.previous_of(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        checkpoint.load(path, RUN)


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, tensors(1), {"epoch": 1}, RUN)

    def full(values: object, name: Path, metadata: object) -> None:
        Path(name).write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*is intact"):
        checkpoint.save(path, tensors(2), {"epoch": 2}, RUN)
    monkeypatch.undo()
    loaded = checkpoint.load(path, RUN)
    assert loaded is not None
    assert loaded[1] == {"epoch": 1}
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_complete_module_and_optimizer_are_saved() -> None:
    def trained(steps: int, resume_at: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        for step in range(steps):
            if step == resume_at:
                packed = {name: value.clone() for name, value in checkpoint.pack(module, optimizer).items()}
                module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
                optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
                checkpoint.unpack(packed, module, optimizer)
            optimizer.zero_grad()
            module(inputs).square().sum().backward()
            optimizer.step()
        return checkpoint.pack(module, optimizer)

    straight, resumed = trained(4), trained(4, resume_at=2)
    assert straight.keys() == resumed.keys()
    assert any(name.endswith("momentum_buffer") for name in straight)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_a_checkpoint_of_another_model_is_refused() -> None:
    module = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"missing \['weight'\], unexpected \['wieght'\]"):
        checkpoint.unpack(
            {"module.bias": torch.zeros(4), "module.wieght": torch.zeros(4, 3)}, module, optimizer
        )


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_resumed_optimizer_has_the_memory_layout_of_its_parameters(tmp_path: Path, kind: str) -> None:
    """With another layout than channels-last, torch does not use its fused update."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
        module.to(memory_format=torch.channels_last)
        if kind == "sgd":
            return module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, foreach=True)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, foreach=True)

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        images = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(1))
        for _ in range(steps):
            optimizer.zero_grad()
            module(images.contiguous(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()

    straight, resumed = fresh(), fresh()
    train(*straight, steps=2)
    checkpoint.save(tmp_path / "last", checkpoint.pack(*straight), {}, RUN)
    loaded = checkpoint.load(tmp_path / "last", RUN)
    assert loaded is not None
    checkpoint.unpack(loaded[0], *resumed)
    for ours, theirs in zip(resumed[1].state.items(), straight[1].state.items(), strict=True):
        parameter, values = ours
        assert values.keys() == theirs[1].keys()
        for name, value in values.items():
            assert value.dtype == theirs[1][name].dtype
            if value.shape == parameter.shape:
                assert value.stride() == parameter.stride() == theirs[1][name].stride(), name
    train(*straight, steps=2)
    train(*resumed, steps=2)
    expected = checkpoint.pack(*straight)
    for name, value in checkpoint.pack(*resumed).items():
        assert torch.equal(value, expected[name]), name
