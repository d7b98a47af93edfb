"""Features shared by several evaluations of one encoder, in files that exist until the last one is done.

The first evaluation encodes the images and stores the features in the work folder; others, including those
that run at the same time, wait for its lock and read them: the same bytes as they would compute.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mochi.errors import UserError
from mochi.provenance.fingerprint import digest, file_digest
from mochi.provenance.wanted import Result
from mochi.runtime import distributed
from mochi.runtime.locks import locked
from mochi.storage.atomic import replacing, require_space

logger = logging.getLogger(__name__)


class FeatureFiles:
    """Features of one encoder on one data set at one size, a file for each split.

    Args:
        folder: only for these files.
        result: an evaluation, whose inputs are the encoder and the data.
        how: what else determines the features: code, versions, sizes.
        others: evaluations that need the same features.
    """

    def __init__(self, folder: Path, result: Result, how: Sequence[object], others: list[Result]) -> None:
        self._folder, self._others = folder, others
        self._key = digest([[file_digest(path) for path in result.inputs.values()], *how])

    @contextmanager
    def of_split(self, name: str) -> Iterator["FeatureFile"]:
        """The file of a split, locked by this process; with several ranks, by the first one.

        Ranks do not wait for another process, but encode the images too: collective operations have a time
        limit.
        """
        file = FeatureFile(self._folder / f"{self._key}-{name}.npy", is_kept=self._are_needed())
        if distributed.rank() != 0 or not (file.is_kept or file.path.exists()):
            yield file
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._folder, 0))
            except UserError:
                if distributed.world_size() == 1:
                    logger.info("waiting for another evaluation, which computes the same features")
                    stack.enter_context(locked(self._folder, -1))
                else:
                    file.is_kept = False
            yield file

    def discard_unless_needed(self) -> None:
        """Remove the files if every other evaluation is computed."""
        if not self._are_needed():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _are_needed(self) -> bool:
        return any(other.why_stale() is not None for other in self._others)


class FeatureFile:
    """The features of one split."""

    def __init__(self, path: Path, *, is_kept: bool) -> None:
        self.path, self.is_kept = path, is_kept

    def read(self, shape: tuple[int, int]) -> Tensor | None:
        """The features; None if there are none. Changes to the tensor do not change the file."""
        try:
            values = np.load(self.path, mmap_mode="c", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return None
        if values.shape != shape or values.dtype != np.float32:
            return None
        logger.info("features read from %s", self.path)
        return torch.from_numpy(values)

    def write(self, values: Tensor) -> None:
        """Store the features if another evaluation needs them; on a full disk it computes them again."""
        if not self.is_kept or distributed.rank() != 0:
            return
        for old in set(self.path.parent.glob("*.npy")) - set(self._siblings()):
            old.unlink(missing_ok=True)
        try:
            require_space({self.path.parent: values.nbytes})
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                np.save(file, values.cpu().numpy(), allow_pickle=False)
        except OSError as error:
            logger.warning("%s: features cannot be kept for other evaluations: %s", self.path, error)

    def _siblings(self) -> Iterator[Path]:
        """Files with the same key, of the other splits."""
        return self.path.parent.glob(f"{self.path.name.split('-', 1)[0]}-*.npy")
