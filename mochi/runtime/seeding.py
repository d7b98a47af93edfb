"""Random generators as functions of their purpose and key, such as (seed, epoch).

There is no generator state to save: a resumed run draws the same numbers as an uninterrupted one.
Random parameters of images have a separate vectorised generator, `mochi.data.views.counter_rng`.
"""

import hashlib

import numpy as np
import torch


def seed_of(purpose: str, *key: int) -> int:
    """A seed of 64 bits, the first of a sha256: different purposes or keys give unrelated seeds."""
    text = "/".join([purpose, *map(str, key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """torch's generator for a purpose. Example: `generator("shuffle keys", seed, step)`.

    On a CPU torch reads only the low 32 bits of a seed, which is why seeds are hashed and not packed.
    """
    return torch.Generator(device).manual_seed(seed_of(purpose, *key))


def numpy_generator(purpose: str, *key: int) -> np.random.Generator:
    """numpy's generator for a purpose."""
    return np.random.default_rng(seed_of(purpose, *key))
