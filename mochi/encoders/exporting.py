"""Export an encoder file to other libraries. None of the formats contains code.

Source of the names: torchvision/models/resnet.py; facebookresearch/moco main_lincls.py and
detection/convert-pretrain-to-detectron2.py.
"""

import json
import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mochi.config import Encoder
from mochi.encoders import build
from mochi.encoders.files import (
    EncoderError,
    check_fit,
    check_pixels,
    read_encoder,
    require_new_file,
    require_suffix,
)
from mochi.encoders.resnet import LAYOUTS
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD
from mochi.storage.atomic import replacing

Tensors = dict[str, Tensor]
Format = Literal["torchvision", "timm", "detectron2", "moco"]


class _Writer(NamedTuple):
    """How a format is written, and how the file is loaded."""

    write: Callable[[Path, Tensors, Encoder], None]
    suffixes: tuple[str, ...]
    usage: str


def export_encoder(path: Path, format: Format, out: Path) -> list[str]:
    """Write the encoder in `path` to `out` in another library's format.

    Returns:
        Lines to print: how to load the file.

    Raises:
        EncoderError: `out` is `path` or has the suffix of another format, the file cannot be read, or the
            format does not support the encoder.
    """
    require_new_file(path, out)
    writer = _WRITERS[format]
    require_suffix(out, writer.suffixes)
    info, tensors = read_encoder(path)
    if info is None:
        raise EncoderError(
            f"{path}: has no metadata with the architecture; `mochi import` writes a file that has"
        )
    config = info.config(path)
    check_pixels(path, info)
    with torch.device("meta"):
        check_fit(path, tensors, build(config).state_dict(), config)
    if reason := _impossible(config, format):
        raise EncoderError(f"{path}: is a {config}; {reason}")
    with replacing(out) as temporary:
        writer.write(temporary, tensors, config)
    place = str(out)
    places = {
        "python": repr(place),
        "yaml": json.dumps(place, ensure_ascii=False),
        "shell": shlex.quote(place),
    }
    stem = ""
    if config.stem in ("half", "full"):
        stride = 2 if config.stem == "half" else 1
        stem = (
            f"model.conv1 = nn.Conv2d(3, 64, 3, {stride}, 1, bias=False); model.maxpool = nn.Identity(); "
        )
    usage = writer.usage.format(**places, **_names(config), stem=stem, architecture=config.architecture)
    if format == "detectron2":
        usage += "".join(f", MODEL.RESNETS.{key}: {value}" for key, value in _detectron2_settings(config))
    lines = [f"{out}: {config}, for {format}", f"  load: {usage}"]
    if format != "detectron2":  # its settings contain them
        mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
        lines.append(f"  images: RGB in [0, 1], minus {mean}, divided by {std}")
    return lines


def _names(config: Encoder) -> dict[str, str]:
    """How to build the model there. No library names a plain ResNet-10, but each can build one."""
    name = config.architecture.removeprefix("timm:")
    if name == "resnet10":
        return {
            "torchvision": "models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])",
            "timm": "timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=0)",
        }
    return {"torchvision": f"models.{name}()", "timm": f"timm.create_model('{name}', num_classes=0)"}


def _detectron2_settings(config: Encoder) -> list[tuple[str, int]]:
    """Keys of MODEL.RESNETS that differ from detectron2's defaults (detectron2/config/defaults.py)."""
    assert config.width is not None  # only encoders of timm have none
    layout = LAYOUTS[config.architecture]
    (depth, *_) = re.findall(r"\d+", config.architecture)
    settings = {
        "DEPTH": (int(depth), 50),
        "NUM_GROUPS": (layout.groups, 1),
        "WIDTH_PER_GROUP": (layout.base_width * config.width // 64, 64),
        "STEM_OUT_CHANNELS": (config.width, 64),
        "RES2_OUT_CHANNELS": (config.width * layout.block.expansion, 256),
    }
    return [(key, value) for key, (value, default) in settings.items() if value != default]


def _impossible(config: Encoder, format: Format) -> str | None:
    """Why a format does not support it."""
    if not config.is_resnet:
        return None if format == "timm" else "export it with --format timm"
    if format in ("moco", "detectron2") and config.stem != "imagenet":
        return f"{format} builds ResNets with the 7x7 stem (imagenet) only"
    if format in ("moco", "detectron2") and config.architecture == "resnet10":
        return f"{format} has no ResNet-10"
    if config.width != 64 and format != "detectron2":
        return f"{format}'s ResNets are 64 wide; load it with mochi.load_encoder"
    return None


def _write_torchvision(path: Path, tensors: Tensors, _: Encoder) -> None:
    torch.save(tensors, path)


def _write_timm(path: Path, tensors: Tensors, config: Encoder) -> None:
    prefix = "" if config.is_resnet else "model."
    save_file({name.removeprefix(prefix): value for name, value in tensors.items()}, path, {"format": "pt"})


def _write_moco(path: Path, tensors: Tensors, config: Encoder) -> None:
    state = {f"module.encoder_q.{name}": value for name, value in tensors.items()}
    torch.save({"arch": config.architecture, "state_dict": state}, path)


def _write_detectron2(path: Path, tensors: Tensors, _: Encoder) -> None:
    content = {
        "model": {_detectron2_name(name): value.numpy() for name, value in tensors.items()},
        "__author__": "MoCHi",
        "matching_heuristics": True,
    }
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=4)


def _detectron2_name(name: str) -> str:
    name = name.replace("downsample.1", "shortcut.norm").replace("downsample.0", "shortcut")
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    if not name.startswith("layer"):
        return f"stem.{name}"
    return re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)


_TORCH = (".pth", ".pt", ".tar")

_WRITERS: dict[Format, _Writer] = {
    "torchvision": _Writer(
        _write_torchvision,
        _TORCH,
        "model = {torchvision}; {stem}model.fc = nn.Identity(); "
        "model.load_state_dict(torch.load({python}, weights_only=True))",
    ),
    "timm": _Writer(
        _write_timm,
        (".safetensors",),
        "model = {timm}; {stem}model.load_state_dict(safetensors.torch.load_file({python}))",
    ),
    "detectron2": _Writer(
        _write_detectron2,
        (".pkl",),
        "MODEL.WEIGHTS: {yaml}, INPUT.FORMAT: RGB, MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53], "
        "MODEL.PIXEL_STD: [58.395, 57.12, 57.375], MODEL.RESNETS.STRIDE_IN_1X1: False",
    ),
    "moco": _Writer(_write_moco, _TORCH, "main_lincls.py --arch {architecture} --pretrained {shell}"),
}
