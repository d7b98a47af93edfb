"""Import a checkpoint of another project as an encoder file, or say why it cannot be imported."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from mochi.config import Encoder
from mochi.config.reading import validate
from mochi.config.training import RESNETS
from mochi.encoders import build
from mochi.encoders.checkpoint_files import Checkpoint, open_checkpoint
from mochi.encoders.checkpoint_layouts import Found, find_encoders, origin
from mochi.encoders.files import (
    EncoderError,
    EncoderInfo,
    check_fit,
    digest,
    read_encoder,
    read_info,
    require_new_file,
    require_suffix,
    write_tensors,
)
from mochi.errors import guess
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD

_BYTES = 255.0
_CLOSE = 1e-5
_AUTHORS_OF_RGB = {"torchvision", "moco", "mochi", "vissl"}
"""`__author__` of detectron2 files converted from encoders of RGB images with ImageNet's normalisation."""


Shapes = dict[str, tuple[int, ...]]


class Pixels(NamedTuple):
    """Normalisation in training: (x - mean) / std, in the order of its channels, x from 0 to 1."""

    order: Literal["RGB", "BGR"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_HERE = Pixels("RGB", IMAGENET_MEAN, IMAGENET_STD)
_DETECTRON2_BGR = Pixels("BGR", IMAGENET_MEAN[::-1], (1 / _BYTES,) * 3)
"""Model zoo: bytes minus the mean, not divided."""


class Choices(NamedTuple):
    """The user's choices, for what the file does not contain."""

    which: str = "query"
    """query, momentum, or the prefix of one of several encoders."""
    architecture: str | None = None
    stem: str | None = None
    image_size: int | None = None
    channel_order: Literal["RGB", "BGR"] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def import_checkpoint(file: str, out: Path, choices: Choices | None = None) -> list[str]:
    """Write the encoder in `file` to `out`.

    Returns:
        Lines to print: what was found, used, converted, and not used.

    Raises:
        EncoderError: `out` has the suffix of another format, no checkpoint, none or several encoders,
            missing or unknown tensors (listed), or a normalisation of pixels that the weights cannot
            compensate exactly.
    """
    choices = choices or Choices()
    if re.match(r"[a-zA-Z][\w+.-]*://", file):
        raise EncoderError(f"{file}: is a URL; only local files are read: download it first")
    path = Path(file)
    require_new_file(path, out)
    require_suffix(out, (".safetensors",))
    with open_checkpoint(path) as checkpoint:
        own = read_info(path) if checkpoint.form == "safetensors" else None
        if own and choices.stem not in (None, own.stem):
            raise EncoderError(f"--stem: found {choices.stem}; {path} has stem {own.stem}; omit --stem")
        found = _chosen(path, checkpoint, choices.which)
        config = (
            own.config(path)
            if own and not choices.architecture
            else _architecture(path, checkpoint, found, choices)
        )
        kind = "this project" if own else origin(found, checkpoint.tensors)
        _refuse_other_padding(path, kind, config)
        pixels = _pixels(path, checkpoint, kind, own, choices)
        tensors, dtypes = _loaded(path, checkpoint, found)
        with torch.device("meta"):
            expected = build(config).state_dict()
        likely = _best_fit(_shapes(checkpoint, found), config.stem, RESNETS)
        check_fit(path, tensors, expected, config, _advice(found, likely))
        notes = _convert_pixels(path, tensors, pixels)
        source = f"{path.name} sha256:{_sha256(path)}"
        prefix = f"with prefix {found.prefix.rstrip('.')}" if found.prefix else "without a prefix"
        taken = f"{len(found.names)} of {len(checkpoint.tensors)} tensors, {prefix}"
        lines = [f"{path}: {checkpoint.form}, {kind}: {taken}", *_unused(checkpoint, found)]
    about: dict[str, object] = {"method": kind}
    if own:
        about = own.model_dump(exclude={"architecture", "stem", "width", "mean", "std", "channel_order"})
    about["source"] = source
    if choices.image_size:
        about["image_size"] = choices.image_size
    write_tensors(out, tensors, EncoderInfo.of(config, **about))
    written = read_encoder(out).tensors
    assert digest(written) == digest(tensors), f"{out}: not what was written"
    if dtypes - {torch.float32}:
        notes.append(f"converted to float32 from {', '.join(sorted(str(d)[6:] for d in dtypes))}")
    if config.stem != "imagenet" and not own and not choices.stem:
        notes.append(
            f"the file does not show the stride of its 3x3 stem: taken as stem {config.stem} (stride 1); "
            "--stem half for stride 2; a max-pool after it is not supported"
        )
    if pixels is None:
        notes.append(
            "the file does not say how its pixels were normalised; assuming RGB with ImageNet's mean and "
            "standard deviation; --channel-order, --mean and --std change this"
        )
    return [
        *lines,
        *(f"note: {note}" for note in notes),
        f"{out}: {config}, {len(written)} tensors, sha256 of their values {digest(written)[:16]}",
    ]


def _chosen(path: Path, checkpoint: Checkpoint, which: str) -> Found:
    """The requested encoder."""
    found = find_encoders(checkpoint.tensors)
    if not found:
        firsts = Counter(name.split(".")[0] for name in checkpoint.tensors)
        shown = ", ".join(f"{name} ({count})" for name, count in firsts.most_common(8)) or "no tensors"
        if bare := checkpoint.tensors.get(""):
            shown = f"a single tensor of shape {list(bare.shape)}, without a name"
        caffe = "conv1_w" in str(list(firsts)) or any("branch2a" in name for name in checkpoint.tensors)
        reason = (
            "Caffe2's ResNets have their strides in the 1x1 convolutions, which no encoder here has"
            if caffe
            else "expected the names of a ResNet, such as layer1.0.conv1.weight"
        )
        raise EncoderError(f"{path}: contains no known encoder: found {shown}; {reason}")
    fits = [each for each in found if each.prefix.rstrip(".") == which.rstrip(".")]
    if not fits:
        if which not in ("query", "momentum"):
            raise EncoderError(
                f"--which: found {which!r}; expected query, momentum, or the prefix of an encoder in "
                f"{path}: {_prefixes(found)}"
            )
        fits = [each for each in found if each.is_momentum == (which == "momentum")]
        if which == "query" and not fits:
            fits = found
    if len(fits) != 1:
        raise EncoderError(
            f"{path}: contains {len(fits)} encoders for --which {which}; "
            + (
                "omit --which"
                if len(found) == 1
                else f"choose one by its prefix: --which {_prefixes(fits or found)}"
            )
        )
    return fits[0]


def _prefixes(found: Sequence[Found]) -> str:
    return ", ".join(each.prefix.rstrip(".") or "(no prefix)" for each in found)


def _architecture(path: Path, checkpoint: Checkpoint, found: Found, choices: Choices) -> Encoder:
    """The one whose shapes fit best; `check_fit` reports remaining differences."""
    for option, chosen, allowed in (
        ("--architecture", choices.architecture, RESNETS),
        ("--stem", choices.stem, ("imagenet", "half", "full")),
    ):
        if chosen not in (None, *allowed):
            raise EncoderError(f"{option}: {guess(str(chosen), allowed)}")
    shapes = _shapes(checkpoint, found)
    first = shapes.get("conv1.weight", ())
    kernel = first[-1] if len(first) == 4 else 7
    stems = {7: "imagenet", 3: choices.stem or "full"}
    stem = stems.get(kernel)
    if stem is None or (choices.stem and choices.stem != stem):
        raise EncoderError(
            f"{path}: conv1.weight: found {list(first)}, which is not the first convolution of the stem "
            f"{choices.stem or 'imagenet (7x7), half or full (3x3)'}"
        )
    if choices.architecture:
        width = _width(shapes)
        validate(
            Encoder, {"architecture": choices.architecture, "stem": stem, "width": width}, "--architecture"
        )
    return _best_fit(shapes, stem, [choices.architecture] if choices.architecture else RESNETS)


def _shapes(checkpoint: Checkpoint, found: Found) -> Shapes:
    return {name: checkpoint.tensors[place].shape for name, place in found.names.items()}


def _width(shapes: Shapes) -> int:
    return next((shapes[name][0] for name in ("conv1.weight", "bn1.weight") if shapes.get(name)), 64)


def _best_fit(shapes: Shapes, stem: str | None, names: Sequence[str]) -> Encoder:
    """The architecture with the fewest missing and, counted twice, unknown tensors."""
    best: list[tuple[int, int, Encoder]] = []
    for name in names:
        try:
            config = Encoder.model_validate({"architecture": name, "stem": stem, "width": _width(shapes)})
        except ValidationError:  # a width that this one cannot have
            continue
        expected = _expected(config)
        needed = {key for key in expected if not key.endswith("num_batches_tracked")}
        foreign = sum(expected.get(key) != shape for key, shape in shapes.items())
        best.append((len(needed - shapes.keys()) + 2 * foreign, len(best), config))
    return min(best)[2]


@cache
def _expected(config: Encoder) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build(config).state_dict().items()}


def _refuse_other_padding(path: Path, kind: str, config: Encoder) -> None:
    if kind == "solo-learn" and config.stem != "imagenet":
        raise EncoderError(
            f"{path}: solo-learn's 3x3 stem pads images by 2 pixels, this project's by 1, and features "
            "would differ; only its encoders with the 7x7 stem can be imported"
        )


def _loaded(path: Path, checkpoint: Checkpoint, found: Found) -> tuple[dict[str, Tensor], set[torch.dtype]]:
    """float32 tensors by torchvision's names, with counters that some files lack; the file's dtypes."""
    tensors: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()
    for name, place in found.names.items():
        tensor = checkpoint.tensors[place].load()
        if name.endswith("num_batches_tracked"):
            tensors[name] = tensor.to(torch.int64)
        elif not tensor.is_floating_point():
            raise EncoderError(f"{path}: {place}: found {tensor.dtype}; expected floating-point weights")
        else:
            dtypes.add(tensor.dtype)
            tensors[name] = tensor.to(torch.float32)
    for name in [name for name in tensors if name.endswith(".running_mean")]:
        tensors.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return tensors, dtypes


def _advice(found: Found, likely: Encoder) -> str:
    return (
        f"The shapes fit a {likely} best. Names are torchvision's; in the file, their prefix is "
        f"{found.prefix.rstrip('.') or 'none'}. Expected a whole encoder, one of: {', '.join(RESNETS)}"
    )


def _pixels(
    path: Path, checkpoint: Checkpoint, kind: str, own: EncoderInfo | None, choices: Choices
) -> Pixels | None:
    """The normalisation given by the user, the file, or its `__author__`; None if there is none."""
    author = str(checkpoint.values.get("__author__", "")).lower()
    known: Pixels | None = None
    if own:
        known = Pixels(own.channel_order, own.mean, own.std)
    elif kind == "detectron2":
        known = _of_detector(checkpoint)
        if known is None and author in _AUTHORS_OF_RGB:
            known = _HERE
        if known is None and choices.channel_order is None:
            raise EncoderError(
                f"{path}: does not say whether it was trained on RGB or BGR (__author__: "
                f"{author or 'missing'}); give --channel-order RGB (normalised like torchvision's) or BGR "
                "(detectron2's own models); encoders with STRIDE_IN_1X1 cannot be imported"
            )
    order = choices.channel_order or (known.order if known else "RGB")
    default = known or _HERE
    if choices.channel_order == "BGR" and (known is None or known.order != "BGR"):
        default = (
            _DETECTRON2_BGR
            if kind == "detectron2"
            else Pixels("BGR", IMAGENET_MEAN[::-1], IMAGENET_STD[::-1])
        )
    if choices.mean is None and choices.std is None:
        return default._replace(order=order) if known or choices.channel_order else None
    mean = _three("--mean", choices.mean) if choices.mean else default.mean
    std = _three("--std", choices.std) if choices.std else default.std
    if choices.mean and max(mean) > 1:  # for pixels in 0 to 255
        mean = _scaled(mean)
        std = _scaled(std) if choices.std else std
    return Pixels(order, mean, std)


def _of_detector(checkpoint: Checkpoint) -> Pixels | None:
    """A complete detector of detectron2 contains its pixel_mean and pixel_std."""
    places = {name.rpartition(".")[2]: name for name in checkpoint.tensors}
    if "pixel_mean" not in places or "pixel_std" not in places:
        return None
    mean, std = (
        _scaled(checkpoint.tensors[places[name]].load().flatten().tolist())
        for name in ("pixel_mean", "pixel_std")
    )
    return Pixels("BGR" if mean[0] < mean[2] else "RGB", mean, std)


def _three(option: str, values: Sequence[float]) -> tuple[float, float, float]:
    is_std = option == "--std"
    if len(values) != 3 or not all(math.isfinite(value) and (value > 0 or not is_std) for value in values):
        raise EncoderError(
            f"{option}: found {list(values)}; expected three finite numbers"
            f"{' above 0' if is_std else ''}, one for each channel"
        )
    return values[0], values[1], values[2]


def _scaled(values: Sequence[float]) -> tuple[float, float, float]:
    return values[0] / _BYTES, values[1] / _BYTES, values[2] / _BYTES


def _convert_pixels(path: Path, tensors: dict[str, Tensor], pixels: Pixels | None) -> list[str]:
    """Change conv1 to give, with this project's pixels, the same output up to the rounding of a product.

    Raises:
        EncoderError: a different mean, which padded zeros represent: weights cannot compensate for it.
    """
    notes: list[str] = []
    if pixels is None:
        return notes
    weight, (order, mean, std) = tensors["conv1.weight"].double(), pixels
    if order == "BGR":
        weight, mean, std = weight.flip(1), mean[::-1], std[::-1]
        notes.append("conv1's input channels reversed from BGR to RGB")
    if any(abs(own - here) > _CLOSE for own, here in zip(mean, IMAGENET_MEAN, strict=True)):
        raise EncoderError(
            f"{path}: trained on images with the RGB mean {[round(each, 4) for each in mean]}, here "
            f"{list(IMAGENET_MEAN)}; at the border of an image, where zeros are padded, "
            "no change of the weights compensates for that; fine-tune it with this project's mean first"
        )
    if any(abs(own - here) > _CLOSE for own, here in zip(std, IMAGENET_STD, strict=True)):
        ratio = torch.tensor(IMAGENET_STD, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        weight = weight * ratio[:, None, None]
        notes.append(
            f"the standard deviation {[round(each, 4) for each in std]} folded into conv1; here it is "
            f"{list(IMAGENET_STD)}"
        )
    tensors["conv1.weight"] = weight.float()
    return notes


def _unused(checkpoint: Checkpoint, found: Found) -> list[str]:
    """Everything else in the file, by name: heads, queues, other encoders, the optimizer's state."""
    used = set(found.names.values())
    groups: Counter[str] = Counter()
    for name in checkpoint.tensors:
        if name not in used:
            inside = name.removeprefix(found.prefix)
            below = found.prefix if name.startswith(found.prefix) else ""
            parts = inside.split(".")
            depth = next((n for n, part in enumerate(parts) if part not in _CONTAINERS), 0) + 1
            groups[below + ".".join(parts[:depth])] += 1
    return [
        f"  not used: {name} ({count} tensor{'s' if count > 1 else ''})" for name, count in groups.items()
    ]


_CONTAINERS = {"state_dict", "model", "module", "classy_state_dict", "base_model"}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
