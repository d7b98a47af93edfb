"""Encoder files: a loaded encoder equals the saved one, and a file that does not match is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi import encoders
from mochi.config import Encoder
from mochi.encoders.files import (
    METADATA_KEY,
    EncoderError,
    EncoderInfo,
    digest,
    load_encoder,
    read_encoder,
    read_info,
    save_encoder,
)
from tests.project import ROOT

CONFIG = Encoder(architecture="resnet10", stem="half", width=4)
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved = tmp_path / "encoder.safetensors"
    save_encoder(saved, encoders.build(CONFIG, seed=5))
    return saved


def test_a_loaded_encoder_equals_the_saved_one_and_is_frozen(path: Path) -> None:
    encoder = load_encoder(path, CONFIG, CPU)
    original = encoders.build(CONFIG, seed=5).eval()
    assert digest(encoder.state_dict()) == digest(original.state_dict())
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), original(images))


def test_equal_encoders_give_equal_files(path: Path, tmp_path: Path) -> None:
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
        (lambda w: {**w, "conv1.weight": torch.zeros(4, 3, 3, 3)}, "conv1.weight: found zeros only"),
        (lambda w: {**w, "bn1.running_var": torch.tensor([1, 1, -1e-9, 1])},
         "bn1.running_var: found a variance below 0"),
        (lambda w: {**w, "bn1.bias": torch.ones(4, dtype=torch.int8)}, r"numbers, found torch.int8"),
        (lambda w: {**w, "bn1.bias": torch.ones(4).to(torch.float8_e4m3fn)}, r"found torch.float8_e4m3fn"),
    ],
    ids=["misspelt", "prefixed", "no layer4", "classifier", "stem", "nan", "zeros", "variance", "int8",
         "float8"],
)  # fmt: skip
def test_tensors_that_do_not_match_are_named(
    path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    save_file(change(load_file(path)), path)
    with pytest.raises(EncoderError, match=message) as error:
        load_encoder(path, CONFIG, CPU)
    assert str(error.value).startswith(f"{path} is not a resnet10 with stem half and width 4")
    assert len(str(error.value).splitlines()) <= 13


def test_a_missing_file_and_one_of_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"none: no such encoder; run"):
        read_encoder(tmp_path / "none")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(EncoderError, match=r"is empty \(0 bytes\); download or copy it again"):
        read_encoder(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"pickle")
    with pytest.raises(EncoderError, match="cannot be read as safetensors"):
        read_encoder(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(EncoderError, match="is a pointer of Git LFS, not the file; run `git lfs pull`"):
        read_encoder(tmp_path / "x.safetensors")
    with pytest.raises(EncoderError, match=f"{tmp_path}: is a folder; expected an encoder"):
        read_encoder(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EncoderError, match="pipe: is a pipe or a device, not a regular file; expected"):
        read_encoder(tmp_path / "pipe")


def test_the_digest_depends_on_names_and_bytes_only(path: Path) -> None:
    tensors = read_encoder(path).tensors
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


def with_metadata(path: Path, text: str | None) -> None:
    save_file(load_file(path), path, None if text is None else {METADATA_KEY: text})


@pytest.mark.parametrize("count", [10, 11])
def test_the_first_ten_tensors_that_do_not_match_are_listed(path: Path, count: int) -> None:
    weights = load_file(path)
    save_file({name: weights[name] for name in sorted(weights)[count:]}, path)
    with pytest.raises(EncoderError) as error:
        load_encoder(path, CONFIG, CPU)
    assert str(error.value).count(": expected [") == 10
    assert ("\n  ... and 1 more\nUse an encoder" in str(error.value)) == (count == 11)
    assert ("more" in str(error.value)) == (count == 11)


def test_a_variance_of_zero_is_accepted(path: Path) -> None:
    save_file({**load_file(path), "bn1.running_var": torch.zeros(4)}, path)
    load_encoder(path, CONFIG, CPU)


def test_a_loaded_encoder_is_channels_last(path: Path) -> None:
    weight = load_encoder(path, CONFIG, CPU).get_parameter("layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_a_file_describes_its_encoder(path: Path) -> None:
    assert read_info(path) == EncoderInfo.of(CONFIG)
    info = EncoderInfo.of(CONFIG, image_size=32, method="moco-v2", experiment="x", seed=3)
    save_encoder(path, encoders.build(CONFIG, seed=5), info)
    assert read_info(path) == info
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
    assert list(content) == list(EncoderInfo.model_fields)
    assert content["architecture"] == "resnet10"
    assert content["channel_order"] == "RGB"
    assert content["mean"] == [0.485, 0.456, 0.406]
    assert (content["image_size"], content["method"], content["seed"]) == (32, "moco-v2", 3)


def test_the_same_encoder_is_the_same_file_in_every_process(path: Path, tmp_path: Path) -> None:
    """The order of metadata must not depend on the hash seed of a process."""
    program = (
        "from pathlib import Path; from mochi import encoders; from mochi.config import Encoder\n"
        "from mochi.encoders.files import save_encoder\n"
        "config = Encoder(architecture='resnet10', stem='half', width=4)\n"
        f"save_encoder(Path({str(tmp_path / 'again')!r}), encoders.build(config, seed=5))\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"channel_order": "BGR"}, r"trained on BGR with mean .*; images here are RGB .* mochi import"),
        ({"mean": (0.5, 0.5, 0.5)}, r"trained on RGB with mean \[0.5, 0.5, 0.5\] and"),
        ({"std": (1 / 255,) * 3}, "and standard deviation"),
        ({"stem": "full"}, "its metadata says resnet10 with stem full and width 4"),
        ({"architecture": "resnet11"}, "metadata names an unknown encoder: found 'resnet11'"),
    ],
)
def test_another_normalisation_or_architecture_is_refused(
    path: Path, about: dict[str, object], message: str
) -> None:
    info = EncoderInfo.model_validate(CONFIG.model_dump() | about)
    save_encoder(path, encoders.build(CONFIG, seed=5), info)
    with pytest.raises(EncoderError, match=message):
        load_encoder(path, CONFIG, CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its metadata cannot be read: the whole: Invalid JSON"),
        ("{}", "architecture: Field required"),
        ('{"architecture": 5, "stem": "half", "width": 4}', "architecture: Input should be a valid string"),
        ('{"architecture": "resnet10", "stem": "half", "width": 4, "image_size": 0}', "image_size: Input"),
        ('{"architecture": "resnet10", "stem": "half", "width": 4, "std": [1, 0, 1]}', "std.1: Input"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(path: Path, text: str, message: str) -> None:
    with_metadata(path, text)
    with pytest.raises(EncoderError, match=message):
        load_encoder(path, CONFIG, CPU)


def test_an_older_file_without_metadata_is_read_with_a_note(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_metadata(path, None)
    load_encoder(path, CONFIG, CPU)
    assert "has no metadata: assuming RGB images" in caplog.text
