"""Encoder files: what is loaded is what was saved, and a file that does not fit is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi import encoders
from mochi.config import Encoder
from mochi.encoders.files import EncoderError, digest, load_encoder, read_tensors, save_encoder

CONFIG = Encoder(architecture="resnet10", stem="half", width=4)
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved = tmp_path / "encoder.safetensors"
    save_encoder(saved, encoders.build(CONFIG, seed=5))
    return saved


def test_what_is_loaded_is_what_was_saved_frozen(path: Path) -> None:
    encoder = load_encoder(path, CONFIG, CPU)
    original = encoders.build(CONFIG, seed=5).eval()
    assert digest(encoder.state_dict()) == digest(original.state_dict())
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), original(images))


def test_equal_encoders_are_equal_files(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save_encoder(again, encoders.build(CONFIG, seed=5).to(memory_format=torch.channels_last))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k.replace("layer2.0.conv1", "layer2.0.cnv1"): v for k, v in w.items()},
         r"2 of .*\n  layer2.0.cnv1.weight: expected no such tensor, found .*\n  layer2.0.conv1.weight: "),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, r"and \d+ more"),
        (lambda w: {k: v for k, v in w.items() if "layer4" not in k}, "layer4.0.bn1.bias: expected"),
        (lambda w: {**w, "fc.weight": torch.zeros(2, 2)}, "fc.weight: expected no such tensor"),
        (lambda w: {**w, "conv1.weight": torch.zeros(4, 3, 7, 7)},
         r"conv1.weight: expected \[4, 3, 3, 3\], found \[4, 3, 7, 7\]"),
        (lambda w: {**w, "bn1.bias": torch.full((4,), torch.nan)}, "bn1.bias: found NaN or Inf"),
    ],
    ids=["misspelt", "prefixed", "no layer4", "classifier", "another stem", "nan"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    save_file(change(load_file(path)), path)
    with pytest.raises(EncoderError, match=message) as error:
        load_encoder(path, CONFIG, CPU)
    assert str(error.value).startswith(f"{path} is not a resnet10 with stem half and width 4")
    assert len(str(error.value).splitlines()) <= 13


def test_a_missing_file_and_one_of_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"none: no such encoder; run the pretraining"):
        read_tensors(tmp_path / "none")
    (tmp_path / "x.safetensors").write_bytes(b"pickle")
    with pytest.raises(EncoderError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "x.safetensors")


def test_the_digest_counts_names_and_bytes_and_nothing_else(path: Path) -> None:
    tensors = read_tensors(path)
    whole = digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == whole
    moved = {
        k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in tensors.items()
    }
    assert digest(moved) == whole
    changed = {**tensors, "bn1.num_batches_tracked": torch.tensor(1)}
    assert digest(changed) != whole
    assert digest(changed, "conv1") == digest(tensors, "conv1")
    assert digest(changed, "bn1") != digest(tensors, "bn1")
    renamed = {("bn1.shift" if name == "bn1.bias" else name): value for name, value in tensors.items()}
    assert digest(renamed) != whole
