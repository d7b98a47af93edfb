"""Settings that fit a set of images, each with its reason: a start for people who bring their own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """One key of an experiment file."""

    key: str
    value: object
    why: str


@dataclass(frozen=True)
class Facts:
    """What the advice depends on."""

    num_train: int
    """Images to pretrain on, labelled or not."""
    short_side: int
    """Median of the shorter sides, pixels."""
    train_classes: dict[str, int]
    """Labelled training images of each class; empty without labels."""
    has_val: bool


def advise(facts: Facts) -> list[Advice]:
    """From the number and size of the images to an experiment's keys, in its order."""
    if facts.num_train < _FEWEST:
        why = f"{facts.num_train} images are too few to learn from; there should be thousands"
        return [Advice("pretrain", None, why), *_evaluation(facts)]
    size = _image_size(facts.short_side)
    batch = _batch_size(facts.num_train)
    steps = facts.num_train // batch
    return [
        Advice("augmentation.image_size", size, f"the median short side is {facts.short_side} px"),
        Advice(
            "augmentation.blur",
            size >= 64,
            "version 2 blurs half of the views with sigma up to 2 px, which leaves nothing of small images",
        ),
        Advice("encoder.stem", "imagenet" if size >= 128 else "half" if size >= 64 else "full", _STEM),
        *_recipe(facts.num_train, batch, steps),
        *_evaluation(facts),
    ]


_FEWEST = 64
_STEM = "imagenet divides the sides by 4 before the first stage, half by 2, full keeps them"


def _image_size(short_side: int) -> int:
    """The usual sizes: CIFAR's, STL-10's, Imagenette's, ImageNet's."""
    return next(
        (size for size, up_to in ((32, 48), (64, 80), (96, 112), (128, 160)) if short_side < up_to), 224
    )


def _power_of_two(limit: float, lowest: int, highest: int) -> int:
    """The largest power of two up to `limit`, kept between two powers."""
    value = lowest
    while value * 2 <= min(limit, highest):
        value *= 2
    return value


def _batch_size(num_train: int) -> int:
    """256 (the paper's), less where an epoch would have fewer than 16 steps."""
    return _power_of_two(num_train / 16, 8, 256)


def _recipe(num_train: int, batch: int, steps: int) -> list[Advice]:
    queue = _power_of_two(num_train / 6, 8, 65536)
    momentum = 0.999 if steps >= 400 else 0.99
    epochs = min(800, max(200, -(-40_000 // max(steps, 1) // 100) * 100))
    hardest = _power_of_two(queue / 16, 4, 1024)
    return [
        Advice("pretrain.batch_size", batch, f"{steps} steps an epoch; 256 is the paper's"),
        Advice("pretrain.lr", 0.03 * batch / 256, "0.03 for a batch of 256 (MoCo), in proportion"),
        Advice(
            "pretrain.queue_size",
            queue,
            f"a query meets its own image in the queue with chance K / images = {queue / num_train:.0%}; "
            f"the oldest key is {queue / batch:.0f} steps old; the paper has 16384 for 127 thousand images "
            "and 65536 for 1.28 million",
        ),
        Advice(
            "pretrain.key_momentum",
            momentum,
            f"the key encoder trails {1 / (1 - momentum):.0f} steps behind; an epoch has {steps}",
        ),
        Advice(
            "pretrain.epochs",
            epochs,
            f"{epochs * steps:,} steps; the paper's 200 epochs are 99 thousand on ImageNet-100",
        ),
        Advice(
            "methods.mochi-N-s-s'",
            f"mochi-{hardest}-{hardest // 2}-{hardest // 4}",
            f"the paper's 1024-512-256; N is {hardest / queue:.0%} of the queue, the paper's at most 6%",
        ),
    ]


def _evaluation(facts: Facts) -> list[Advice]:
    filled = [count for count in facts.train_classes.values() if count]
    if not filled or not facts.has_val:
        lacking = "a val (or test) folder" if filled else "labelled images in train"
        return [
            Advice("evaluation", None, f"no probe without {lacking}; the encoder can still be exported")
        ]
    return [
        Advice(
            "evaluation.knn.k",
            min(200, *filled),
            f"at most the smallest class ({min(filled)} images); 200 is usual on ImageNet",
        ),
        Advice(
            "evaluation.linear.lr_candidates",
            [0.3, 1.0, 3.0, 10.0, 30.0],
            "30 fits MoCo's features of ImageNet alone; on other sets it may diverge, so several are tried",
        ),
        Advice(
            "evaluation.linear.standardize",
            True,
            "features of unit variance let one learning rate fit every encoder",
        ),
    ]
