"""Is this run healthy, how far is it, and when will it end?"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from mochi.errors import UserError


class NonFiniteError(UserError):
    """A loss or parameters that are no finite numbers: training cannot go on."""


def check_finite(loss: float, *, step: int, lr: float, last_good: Path, norm: float = 0.0) -> None:
    """Stop at the first loss that is not finite, or at an update that ruined the parameters.

    Args:
        loss: it tells of the parameters before the update.
        step: the step of the update.
        lr: its learning rate.
        last_good: the checkpoint to name.
        norm: of all parameters after the update, which is what a checkpoint holds.

    Raises:
        NonFiniteError: names the step, the learning rate and the last good checkpoint.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = f"the norm of the parameters is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    checkpoint = f"{last_good}" if last_good.exists() else "none yet"
    raise NonFiniteError(
        f"{found} at step {step} (learning rate {lr:.6g}); expected a finite number. "
        f"Last good checkpoint: {checkpoint}. Lower the learning rate, or look for images without "
        "contrast or with values out of range; the same command goes on from that checkpoint"
    )


class Progress:
    """A bar on a terminal, a plain line every few seconds in a log; both with an ETA."""

    def __init__(self, label: str, total: int, done: int = 0, every_seconds: float = 10.0) -> None:
        self._label, self._total, self._first, self._every = label, total, done, every_seconds
        self._bar = (
            tqdm(desc=label, total=total, initial=done, dynamic_ncols=True) if sys.stderr.isatty() else None
        )
        self._done = done
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def advance(self, note: str = "") -> None:
        """One more unit of work is done; `note` says how it goes."""
        self._done += 1
        if self._bar:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._last >= self._every or self._done == self._total:
            self._last = now
            rate = (self._done - self._first) / max(now - self._start, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            sys.stderr.write(f"{self._label}: {self._done}/{self._total}, {_clock(left)} left, {note}\n")
            sys.stderr.flush()


def counter(label: str) -> Callable[[int, int], None]:
    """A function of (done, total) that shows progress, for code that counts by itself."""
    shown: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(label, total, done - 1))
        shown[0].advance()

    return report


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def verdict(*, loss: float, chance: float, spread: float, queue_fill: float, dim: int) -> str:
    """Plain words on a contrastive run.

    Args:
        loss: mean loss of the epoch, nats.
        chance: ln(1 + number of negatives), the loss of a network that knows nothing.
        spread: mean standard deviation of each coordinate of unit queries; 1/sqrt(dim) when they fill
            the sphere evenly, 0 when all are equal (Chen & He 2021, SimSiam, figure 2).
        queue_fill: share of the queue holding real keys, 0 to 1.
        dim: length of a feature.
    """
    if spread < 0.1 / math.sqrt(dim):
        return "collapsed: all images look alike to the encoder; lower the learning rate"
    if queue_fill < 1:
        return f"queue filling ({queue_fill:.0%}): a rising loss is normal until it is full"
    if loss > 0.98 * chance:
        return "at chance: nothing learnt yet; normal in the first epochs, a fault later"
    return "learning"


def write_events(folder: Path | None, row: Mapping[str, Any]) -> None:
    """Add an epoch's numbers to the TensorBoard events in `folder`; None: do nothing."""
    if folder is None:
        return
    writer = _writer(folder)
    for name, value in row.items():
        if isinstance(value, int | float):
            writer.add_scalar(name, value, row["epoch"])
    writer.flush()


@cache
def _writer(folder: Path) -> Any:
    """One file of events for each folder and process."""
    # Imported here: it takes a second that most commands need not spend.
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    return SummaryWriter(str(folder))
