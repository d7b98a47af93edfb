"""What both judges of features share: the same bytes asked for, and the number format on record."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mochi.config import Experiment, resolve
from mochi.evaluation import features, knn, linear


@pytest.mark.parametrize("stage", [linear, knn])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_format_is_that_of_the_device_and_on_record(
    tiny: Experiment,
    tiny_data: Path,
    encoder_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: object,
    *,
    bfloat16: bool,
) -> None:
    monkeypatch.setattr(stage, "pick_device", lambda: torch.device("cpu"))
    for ask in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, ask, lambda: bfloat16)
    used = set()
    forward = features.ResNet.forward

    def watched(self: features.ResNet, images: torch.Tensor) -> torch.Tensor:
        used.add(torch.is_autocast_enabled("cpu"))
        return forward(self, images)

    monkeypatch.setattr(features.ResNet, "forward", watched)
    stage.run(resolve(tiny, "random-init", 0), tiny_data, encoder_file, tmp_path)  # type: ignore[attr-defined]
    assert used == {bfloat16}
    recorded = json.loads((tmp_path / "provenance.json").read_text())["precision"]
    assert recorded == ("bfloat16" if bfloat16 else "float32")


@pytest.mark.parametrize("stage", [linear, knn])
def test_deterministic_kernels_are_asked_for_before_the_first_image(
    tiny: Experiment,
    tiny_data: Path,
    encoder_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: object,
) -> None:
    order: list[str] = []
    load: Callable[..., features.ResNet] = features.load_encoder
    monkeypatch.setattr(stage, "make_deterministic", lambda: order.append("deterministic"))
    monkeypatch.setattr(stage, "load_encoder", lambda *given: (order.append("encoder"), load(*given))[1])
    stage.run(resolve(tiny, "random-init", 0), tiny_data, encoder_file, tmp_path)  # type: ignore[attr-defined]
    assert order == ["deterministic", "encoder"]
