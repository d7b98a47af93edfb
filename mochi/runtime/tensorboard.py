"""TensorBoard events of a training run, if tensorboard is installed: curves by epoch and step, images."""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def write_events(folder: Path | None, row: Mapping[str, Any]) -> None:
    """Add the numbers of a row to the events in `folder`.

    Without tensorboard, or if they cannot be written, log one line about it.

    Args:
        folder: of the run's events; None: write nothing.
        row: name -> value; `epoch` is the position on the horizontal axis, text is skipped.
    """

    def add(writer: Any) -> None:
        for name, value in row.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, row["epoch"])

    _write(folder, add)


def write_step(folder: Path | None, step: int, values: Mapping[str, float]) -> None:
    """Add points within an epoch, as `step/<name>` at the step since the beginning of the training."""

    def add(writer: Any) -> None:
        for name, value in values.items():
            writer.add_scalar(f"step/{name}", value, step)

    _write(folder, add)


def write_picture(folder: Path | None, name: str, picture: Any) -> None:
    """Add a picture (H, W, 3) uint8, such as a grid of views."""
    _write(folder, lambda writer: writer.add_image(name, picture, 0, dataformats="HWC"))


_given_up: set[Path] = set()


def _write(folder: Path | None, add: Callable[[Any], None]) -> None:
    """Write with the folder's writer. A full disk ends the events, not the training."""
    if folder is None or folder in _given_up:
        return
    try:
        if (writer := _writer(folder.resolve())) is not None:
            add(writer)
            writer.flush()
    except OSError as error:
        _given_up.add(folder)
        logger.warning("%s: no more TensorBoard events are written: %s", folder, error.strerror)


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
    # Its thread keeps an error for the next call, and would show a traceback too.
    show = threading.excepthook
    threading.excepthook = lambda error: None if isinstance(error.exc_value, OSError) else show(error)
    return SummaryWriter
