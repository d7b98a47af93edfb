"""The resume checkpoint of an evaluation."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from mochi.provenance.fingerprint import file_digest
from mochi.provenance.record import Stopwatch
from mochi.provenance.wanted import Result
from mochi.storage import checkpoint

logger = logging.getLogger(__name__)

MINUTES = 10.0
"""Minimum time between two checkpoints. A kill loses what was computed since the last one."""


class ResumePoint:
    """The checkpoint from which a killed evaluation continues, and its code digests for provenance.

    The checkpoint records the result it belongs to (settings, encoder, data); for a different one it is
    refused.
    """

    def __init__(self, work: Path, result: Result, watch: Stopwatch) -> None:
        self._path = work / "checkpoint.safetensors"
        inputs = {name: file_digest(path) for name, path in result.inputs.items()}
        self._identity = {"result": result.label, "settings": dict(result.settings), "inputs": inputs}
        self._label = result.label
        self.code_digests = [result.code_digest]
        """Digests of the code that computed the result; several if it changed between two attempts."""
        self._earlier_seconds = 0.0
        self._watch = watch
        self._last_save = time.monotonic()

    def additional_bytes(self, size: int) -> int:
        """Disk space for checkpoints of `size` bytes, without that of existing ones."""
        return checkpoint.additional_bytes(self._path, size)

    def load(self) -> tuple[dict[str, Tensor], int] | None:
        """The last saved tensors and progress; None at the beginning.

        Raises:
            CheckpointError: the checkpoint is of another result, or unreadable.
        """
        loaded = checkpoint.load(self._path, self._identity)
        if loaded is None:
            return None
        tensors, state = loaded
        code = self.code_digests[-1]
        if code not in state["code_digests"]:
            logger.warning("the code changed since the checkpoint was written; recorded in provenance.json")
        self.code_digests = list(dict.fromkeys([*state["code_digests"], code]))
        self._earlier_seconds = state["wall_seconds"]
        logger.info("%s resumes after epoch %d", self._label, state["done"])
        return tensors, state["done"]

    def save_if_due(self, tensors: Callable[[], Mapping[str, Tensor]], done: int) -> None:
        """Save, unless the last save was less than `MINUTES` ago.

        Args:
            tensors: returns what `load` will return.
            done: epochs that are complete.

        Raises:
            CheckpointError: the disk is full or the folder read-only.
        """
        if time.monotonic() - self._last_save < 60 * MINUTES:
            return
        state = {"done": done, "code_digests": self.code_digests, "wall_seconds": self.wall_seconds()}
        checkpoint.save(self._path, tensors(), state, self._identity)
        self._last_save = time.monotonic()

    def discard(self) -> None:
        """Remove the checkpoint: the evaluation is complete."""
        checkpoint.discard(self._path)

    def wall_seconds(self) -> float:
        """Time of all attempts, up to their last checkpoints."""
        return round(self._earlier_seconds + self._watch.seconds(), 3)
