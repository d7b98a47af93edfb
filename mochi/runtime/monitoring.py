"""Monitor training: stop at NaN or Inf, and describe each epoch."""

import math
from collections.abc import Mapping
from pathlib import Path

from mochi.errors import UserError

CHECK_INTERVAL = {"cpu": 1, "cuda": 20}
"""Steps between two checks of the loss. A check synchronises with the device, so a GPU is checked less
often. Only checked states are saved, so training can continue from every checkpoint.
"""


class NonFiniteError(UserError):
    """NaN or Inf in a loss or in parameters: training cannot continue."""


def check_finite(loss: float, *, step: int, lr: float, last_good: Path, norm: float = 0.0) -> None:
    """Stop at the first loss that is not finite, or parameter norm that is not finite.

    Args:
        loss: loss before the update.
        step: the step of the update.
        lr: its learning rate.
        last_good: the checkpoint to name.
        norm: of all parameters after the update, which is what a checkpoint contains.

    Raises:
        NonFiniteError: names the step, the learning rate and the last good checkpoint.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = f"the norm of the parameters is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    checkpoint = f"{last_good}" if last_good.exists() else "none yet"
    raise NonFiniteError(
        f"{found} at step {step} (learning rate {lr:.6g}); expected a finite number. "
        f"Last good checkpoint: {checkpoint}. Lower the learning rate, or check the images for missing "
        "contrast and values out of range; the same command continues from that checkpoint"
    )


def training_status(
    *,
    loss: float,
    chance: float,
    feature_std: float,
    queue_fill: float,
    dim: int,
    accuracies: Mapping[int, float],
) -> str:
    """Describe the state of contrastive training at the end of an epoch in one line.

    Args:
        loss: mean loss of the epoch, nats.
        chance: the rule's loss if all similarities are equal, nats; ln(1 + number of negatives) for MoCo.
        feature_std: mean standard deviation of each coordinate of unit queries; 1/sqrt(dim) if they
            cover the sphere evenly, 0 if all are equal (Chen & He 2021, SimSiam, figure 2).
        queue_fill: fraction of the queue with keys of images, 0 to 1.
        dim: number of coordinates of a query.
        accuracies: epoch -> proxy-task accuracy, 0 to 1, of the epochs that began with a full queue, this
            one included; before that, the queue's random rows are easy negatives.
    """
    if feature_std < 0.1 / math.sqrt(dim):
        return "collapsed: all images have the same features; lower the learning rate"
    if queue_fill < 1:
        return f"queue filling ({queue_fill:.0%}): a rising loss is normal until it is full"
    if accuracies:
        best = max(accuracies, key=lambda epoch: accuracies[epoch])
        latest = accuracies[max(accuracies)]
        # More than the noise of an epoch: an accuracy of 5% on 4,000 images has a standard error of 0.35%.
        if latest < 0.75 * accuracies[best]:
            return f"accuracy falling since epoch {best}: {accuracies[best]:.1%} then, {latest:.1%} now"
    if loss > 0.98 * chance:
        return "at chance: nothing learnt yet; normal in the first epochs, a fault later"
    return "learning"
