"""A counter-based random number generator: every number is a pure function of its key.

An ordinary generator has a state to save, to split among workers and to advance in the right order. Here
every number is a hash of (purpose, seed, epoch, ..., index, column), so workers, batch size, order and
resume change nothing, and there is no state.

Source: splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _state(purpose: str, key: tuple[int, ...]) -> NDArray[np.uint64]:
    """Fold a purpose and its numbers into one 64-bit state, shape (1,)."""
    state = np.array([len(key)], dtype=np.uint64)
    for part in (*purpose.encode(), *key):
        state = _mix((state ^ np.uint64(part)) + _GOLDEN)
    return state


def bits(purpose: str, *key: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each of `indices` (B,)."""
    return _mix((indices.astype(np.uint64) ^ _state(purpose, key)) + _GOLDEN)


def uniforms(purpose: str, *key: int, indices: NDArray[np.int64], columns: int) -> NDArray[np.float64]:
    """(B, columns) uniform numbers in [0, 1), each row a separate splitmix64 stream."""
    rows = bits(purpose, *key, indices=indices)[:, None]
    steps = np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN
    return (_mix(rows + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, purpose: str, *key: int) -> NDArray[np.int64]:
    """A random order of 0..count-1."""
    return np.argsort(bits(purpose, *key, indices=np.arange(count)), kind="stable")
