"""docs/library.md runs as written, and so does lightly's MoCo example with the loss replaced."""

import copy
import math
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from mochi import MoCHiLoss
from mochi.config import Encoder
from mochi.encoders import build
from mochi.encoders.files import save_encoder

ROOT = Path(__file__).parents[1]


def python_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the blocks of the page define, run in order in one folder."""
    folder = tmp_path_factory.mktemp("library")
    pretrained = build(Encoder(architecture="resnet10", stem="half", width=32), seed=0)
    save_encoder(folder / "encoder.safetensors", pretrained)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        for number, block in enumerate(python_blocks("docs/library.md")):
            exec(compile(block, f"docs/library.md, block {number}", "exec"), names)  # noqa: S102
    return {**names, "pretrained": pretrained}


def test_the_loss_falls_once_the_queue_is_full(page: dict[str, Any]) -> None:
    losses = page["losses"]
    full = 256 // 64
    assert len(losses) == 100
    assert int(page["criterion"].queue.num_enqueued) == 6400
    assert losses[full] > losses[0]
    assert mean(losses[-10:]) < mean(losses[full : full + 10]) - 1


def test_the_checkpoint_restores_the_queue(page: dict[str, Any]) -> None:
    saved, criterion = page["checkpoint"]["criterion"], page["criterion"]
    assert torch.equal(saved["queue.keys"], criterion.queue.keys)
    assert criterion.steps == 100


def test_another_rule_by_name(page: dict[str, Any]) -> None:
    weighted = page["weighted"]
    assert math.isfinite(page["loss"].item())
    assert weighted.queue.images[:64].tolist() == list(range(64))


def test_the_encoder_is_the_one_in_the_file(page: dict[str, Any]) -> None:
    backbone = page["backbone"]
    assert page["features"].shape == (2, backbone.num_features) == (2, 256)
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    expected = page["pretrained"].state_dict()
    assert all(torch.equal(expected[name], value) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, "is not a resnet10 with stem half and width 16"),
        ({"architecture": "resnet9"}, "load_encoder: architecture: .*resnet9.*resnet10"),
        ({"path": "nowhere.safetensors"}, "nowhere.safetensors: no such encoder"),
    ],
)
def test_load_encoder_refuses_other_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from mochi import load_encoder

    config = {"architecture": "resnet10", "stem": "half", "width": 8}
    save_encoder(tmp_path / "encoder.safetensors", build(Encoder.model_validate(config)))
    name = changes.pop("path", "encoder.safetensors")
    with pytest.raises(ValueError, match=message):
        load_encoder(str(tmp_path / name), **{**config, **changes})


def test_the_readmes_block_runs() -> None:
    """With the paper's sizes, two steps, and the names that the README leaves to the reader."""
    blocks = [block for block in python_blocks("README.md") if "MoCHiLoss" in block]
    assert blocks, "the README shows no use of the library"
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 128))
    before = encoder[1].weight.detach().clone()
    names = {
        "torch": torch,
        "device": "cpu",
        "encoder": encoder,
        "momentum_encoder": copy.deepcopy(encoder),
        "optimizer": torch.optim.SGD(encoder.parameters(), lr=0.1),
        "loader": torch.randn(2, 2, 8, 3, 2, 2),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    assert math.isfinite(names["loss"].item())
    assert int(names["criterion"].queue.num_enqueued) == 16
    assert not torch.equal(before, encoder[1].weight)


def test_lightlys_moco_example_with_the_loss_replaced() -> None:
    """The structure of lightly's examples/pytorch/moco.py: its head and momentum update, our loss."""
    heads = pytest.importorskip("lightly.models.modules", reason="lightly is not installed")
    utils = pytest.importorskip("lightly.models.utils", reason="lightly is not installed")
    torch.manual_seed(0)
    backbone = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
    head = heads.MoCoProjectionHead(512, 512, 128)
    momentum_backbone, momentum_head = copy.deepcopy(backbone), copy.deepcopy(head)
    for each in (momentum_backbone, momentum_head):
        utils.deactivate_requires_grad(each)
    # Lightly's: NTXentLoss(memory_bank_size=(64, 128)).
    criterion = MoCHiLoss(64, 128, 0.2, num_hardest=16, num_pair_synthetics=8, num_query_synthetics=8)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)
    before = backbone[0].weight.detach().clone()
    for _ in range(2):
        first, second = torch.randn(2, 8, 3, 32, 32)
        utils.update_momentum(backbone, momentum_backbone, m=0.99)
        utils.update_momentum(head, momentum_head, m=0.99)
        loss = criterion(head(backbone(first)), momentum_head(momentum_backbone(second)).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert math.isfinite(loss.item())
    assert not torch.equal(before, backbone[0].weight)
    assert int(criterion.queue.num_enqueued) == 16
