"""CIFAR-100 in its binary version, with its 100 fine classes."""

from pathlib import Path

from mochi.config.datasets import Cifar
from mochi.data.ingest.fetch import Archive
from mochi.data.ingest.raw import RawDataset
from mochi.data.ingest.sources.cifar10 import Layout, read

# Checksum: https://www.cs.toronto.edu/~kriz/cifar.html
LAYOUT = Layout(
    archive=Archive(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
    ),
    folder="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    names="fine_label_names.txt",
    label_bytes=2,  # coarse, fine
)


def collect(config: Cifar, cache: Path) -> RawDataset:
    """Read both splits; the test images are `val`. Raises as `cifar10.read`."""
    return read(LAYOUT, config, cache)
