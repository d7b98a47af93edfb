"""Recommended settings for a set of images, each with its reason."""

from dataclasses import dataclass

FEWEST = 64
"""Training images; with fewer, no pretraining settings are recommended."""

FEWEST_TO_TRAIN = 16
"""Training images; with fewer there are too few negatives, and nothing is trained."""

FEW_STEPS = 20_000
"""Below, `mochi init` writes four times the recommended learning rate."""


@dataclass(frozen=True)
class Advice:
    """One key of an experiment file."""

    key: str
    value: object
    """In YAML's types, as in an experiment file."""
    why: str


@dataclass(frozen=True)
class Facts:
    """The facts that recommendations depend on."""

    num_train: int
    """Training images, labelled or not."""
    short_side: int
    """Median of the shorter sides, pixels."""
    train_classes: dict[str, int]
    """Labelled training images of each class; empty without labels."""
    has_val: bool
    largest: int = 224
    """Side of the largest view that the machine can train on in a reasonable time, pixels."""


def advise(facts: Facts, fewest: int = FEWEST) -> list[Advice]:
    """Settings for images of this number and size, in the order of an experiment file.

    Those of pretraining are omitted if there are fewer than `fewest` images.
    """
    size = min(view_size(facts.short_side), facts.largest)
    if facts.num_train < fewest:
        return _evaluation(facts, size)
    batch = _batch_size(facts.num_train)
    steps = facts.num_train // batch
    return [
        Advice("augmentation.image_size", size, f"the median short side is {facts.short_side} px"),
        Advice(
            "augmentation.blur",
            size >= 64,
            "version 2 blurs half of the views with sigma up to 2 px; too much below 64 px",
        ),
        Advice("encoder.stem", stem(size), STEM),
        *_recipe(facts.num_train, batch, steps),
        *_evaluation(facts, size),
    ]


SIZES = (32, 64, 96, 128, 224)
"""Sides of views, pixels."""


def stem(size: int) -> str:
    """The stem of an encoder for views of this size."""
    return "imagenet" if size >= 128 else "half" if size >= 64 else "full"


STEM = "imagenet downsamples by 4 before the first stage, half by 2, full not at all"


def view_size(short_side: int) -> int:
    """The size of views in CIFAR, STL-10, Imagenette or ImageNet, whichever fits."""
    return next(
        (size for size, up_to in ((32, 48), (64, 80), (96, 112), (128, 160)) if short_side < up_to), 224
    )


def _power_of_two(limit: float, lowest: int, highest: int) -> int:
    """The largest power of two up to `limit`, between two powers of two."""
    value = lowest
    while value * 2 <= min(limit, highest):
        value *= 2
    return value


def _batch_size(num_train: int) -> int:
    """256 (the paper's), or less if an epoch would have fewer than 16 steps."""
    return _power_of_two(num_train / 16, 8, 256)


def _recipe(num_train: int, batch: int, steps: int) -> list[Advice]:
    queue = _power_of_two(num_train / 6, 8, 65536)
    old = round(queue / batch)
    steps_old = f"{old} step" if old == 1 else f"{old} steps"
    momentum = 0.999 if steps >= 400 else 0.99
    epochs = min(800, max(200, -(-40_000 // max(steps, 1) // 100) * 100))
    hardest = _power_of_two(queue / 16, 4, 1024)
    return [
        Advice("pretrain.batch_size", batch, f"{steps} steps per epoch; 256 is the paper's"),
        Advice(
            "pretrain.lr",
            0.03 * batch / 256,
            "0.03 for a batch of 256 (MoCo), scaled linearly; "
            f"below {FEW_STEPS:,} steps `mochi init` writes four times this",
        ),
        Advice(
            "pretrain.queue_size",
            queue,
            f"the queue has a query's own image with probability K / images = {queue / num_train:.0%}; the "
            f"oldest key is {steps_old} old; the paper uses 16384 for 127 thousand images, "
            "65536 for 1.28 million",
        ),
        Advice(
            "pretrain.key_momentum",
            momentum,
            f"the key encoder averages over {1 / (1 - momentum):.0f} steps; an epoch has {steps}",
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


def _evaluation(facts: Facts, size: int) -> list[Advice]:
    resize = min(round(size * 8 / 7), max(size, facts.short_side))
    filled = [count for count in facts.train_classes.values() if count]
    if not filled or not facts.has_val:
        missing = "a val (or test) folder" if filled else "labelled images in train"
        crop = {"image_size": size, "resize": resize}
        return [Advice("evaluation", crop, f"no linear probe and no kNN without {missing}")]
    return [
        Advice("evaluation.image_size", size, "the centre crop has the size of the training views"),
        Advice(
            "evaluation.resize", resize, "8/7 of the crop as on ImageNet, unless images would be enlarged"
        ),
        Advice(
            "evaluation.knn.k",
            min(200, *filled),
            f"at most the smallest class ({min(filled)} images); 200 is usual on ImageNet",
        ),
        Advice(
            "evaluation.linear.lr_candidates",
            [0.3, 1.0, 3.0, 10.0, 30.0],
            "30 fits MoCo's features on ImageNet only; elsewhere it may diverge, so several are compared",
        ),
        Advice(
            "evaluation.linear.standardize",
            True,
            "with features of unit variance one learning rate fits every encoder",
        ),
    ]
