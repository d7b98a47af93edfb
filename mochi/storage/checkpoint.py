"""Resume checkpoints: tensors and JSON only, written atomically, with the previous one kept.

A checkpoint contains the *identity* of its run, and is refused by any other run: continuing from the
state of another run would be a silent error.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mochi.errors import UserError
from mochi.storage.atomic import replacing

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


def save(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON state to `path`; an existing checkpoint becomes `previous_of(path)`.

    Raises:
        CheckpointError: the disk is full or the folder read-only; the existing checkpoint is intact.
    """
    metadata = {"state": json.dumps(state), "identity": json.dumps(identity, sort_keys=True)}
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        _remove_unfinished(path)
        with replacing(path) as temporary:
            save_file(owned, temporary, metadata)
            if path.exists():
                # A hard link, so that one of the two files always exists.
                with replacing(previous_of(path)) as link:
                    link.hardlink_to(path)
    except (OSError, SafetensorError) as error:
        kept = f"the previous checkpoint is intact: {path}" if path.exists() else "there was none before"
        raise CheckpointError(
            f"the checkpoint could not be written to {path}: {error.__cause__ or error}; {kept}. "
            "Free disk space or make the folder writable, then run the same command again"
        ) from error


def load(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and state of the newest readable checkpoint, or None if there is none.

    If the newest file is corrupt, this is logged and the previous one is used.

    Raises:
        CheckpointError: the checkpoint is of another run (both are named), or none is readable.
    """
    corrupt = []
    for candidate in (path, previous_of(path)):
        if not candidate.exists():
            continue
        try:
            with safe_open(candidate, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = json.loads(metadata["identity"])
            state = json.loads(metadata["state"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            logger.warning("checkpoint %s is corrupt (%s); trying the previous one", candidate, error)
            corrupt.append(candidate)
            continue
        _refuse_another_run(candidate, found, dict(identity))
        return tensors, state
    if corrupt:
        raise CheckpointError(
            f"no readable checkpoint: corrupt: {', '.join(map(str, corrupt))}; "
            "remove them to start this run from its beginning"
        )
    return None


def additional_bytes(path: Path, size: int) -> int:
    """Disk space for checkpoints of `size` bytes, without that of existing ones: three during a save."""
    existing = [file.stat().st_size for file in (path, previous_of(path)) if file.exists()]
    return max(3 * size - sum(existing), 0)


def previous_of(path: Path) -> Path:
    """Path of the checkpoint before the newest one."""
    return path.with_name(f"previous-{path.name}")


def discard(path: Path) -> None:
    """Remove both checkpoints: the run is complete."""
    path.unlink(missing_ok=True)
    previous_of(path).unlink(missing_ok=True)
    _remove_unfinished(path)


def _remove_unfinished(path: Path) -> None:
    """Remove partial files that a kill left, on any host; a run has one writer.

    safetensors writes to `.tmp` and six letters in the same folder, then renames.
    """
    for pattern in (".tmp??????", f".{path.name}.*.tmp", f".{previous_of(path).name}.*.tmp"):
        for left in path.parent.glob(pattern):
            left.unlink(missing_ok=True)


def _refuse_another_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    found, wanted = _flat(found), _flat(wanted)
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if keys:
        theirs = ", ".join(f"{key}={found.get(key)}" for key in keys)
        ours = ", ".join(f"{key}={wanted.get(key)}" for key in keys)
        raise CheckpointError(
            f"{path} is the checkpoint of another run. It was written by the run with {theirs}; "
            f"this is the run with {ours}. To continue that run, restore its settings and data; "
            f"to start this one from its beginning, remove {path.parent}"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, so that a message shows only differences."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def pack(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that training changes: parameters, buffers, and the optimizer's state."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return tensors


def unpack(tensors: Mapping[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `pack` returned, in the memory formats that the module's parameters have now.

    Raises:
        CheckpointError: names are missing or unexpected.
    """
    own = {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if name.startswith("module.")
    }
    expected = set(module.state_dict())
    if own.keys() != expected:
        raise CheckpointError(
            f"the checkpoint does not fit the model: missing {sorted(expected - own.keys())[:5]}, "
            f"unexpected {sorted(own.keys() - expected)[:5]}"
        )
    module.load_state_dict(own)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    _match_layouts(optimizer)


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give the state of each parameter the strides of the parameter.

    A checkpoint is contiguous. If its strides differ from the parameter's, such as channels-last,
    the numbers are the same, but the fused update of all parameters falls back to a slow one for each.
    """
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
