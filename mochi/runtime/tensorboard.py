"""TensorBoard events of a training, if tensorboard is installed: curves by epoch and by step, images."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def write_events(folder: Path | None, row: Mapping[str, Any]) -> None:
    """Add the numbers of a row to the events in `folder`.

    Without tensorboard, log one line about it.

    Args:
        folder: of the training's events; None: write nothing.
        row: name -> value; `epoch` is the position on the horizontal axis, text is skipped.
    """
    if folder is None or (writer := _writer(folder.resolve())) is None:
        return
    for name, value in row.items():
        if isinstance(value, int | float):
            writer.add_scalar(name, value, row["epoch"])
    writer.flush()


def write_step(folder: Path | None, step: int, values: Mapping[str, float]) -> None:
    """Add points within an epoch, as `step/<name>` at the step since the beginning of the training."""
    if folder is None or (writer := _writer(folder.resolve())) is None:
        return
    for name, value in values.items():
        writer.add_scalar(f"step/{name}", value, step)
    writer.flush()


def write_picture(folder: Path | None, name: str, picture: Any) -> None:
    """Add a picture (H, W, 3) uint8, such as a grid of views."""
    if folder is None or (writer := _writer(folder.resolve())) is None:
        return
    writer.add_image(name, picture, 0, dataformats="HWC")
    writer.flush()


@cache
def _writer(folder: Path) -> Any:
    """One event file for each folder and process; None without tensorboard."""
    writer_class = _writer_class()
    return None if writer_class is None else writer_class(str(folder))


@cache
def _writer_class() -> Any:
    # Imported here: it takes a second, and it is optional.
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError as error:
        logger.warning(
            "no TensorBoard events are written (%s); install mochi-pipeline[tensorboard] to have them",
            error,
        )
        return None
    return SummaryWriter
