"""The vectorised splitmix64 compared with its definition in Python integers, and its numbers compared
with their distributions.

Everything that must not depend on workers, batches or resumes uses these numbers.
"""

import numpy as np
import pytest

from mochi.data.views import counter_rng as draws

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    """The finaliser, one number at a time."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_gives_its_published_sequence() -> None:
    """The first outputs of the generator for seed 1234567 (Vigna's splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = np.array([(1234567 + k * GOLDEN) & MASK for k in (1, 2, 3)], dtype=np.uint64)
    assert draws._mix(states).tolist() == expected
    assert [mix(int(state)) for state in states] == expected


def test_bits_are_a_hash_of_the_number_of_keys_purpose_key_and_index() -> None:
    state = 2
    for part in (*b"crop", 3, 7):
        state = mix(((state ^ part) + GOLDEN) & MASK)
    indices = np.array([0, 5, 123456789])
    expected = [mix(((index ^ state) + GOLDEN) & MASK) for index in indices.tolist()]
    assert draws.bits("crop", 3, 7, indices=indices).tolist() == expected


def test_uniforms_are_a_stream_of_each_row() -> None:
    rows = np.array([5, 0, 123456789])
    key = draws.bits("crop", 3, 7, indices=rows)
    uniforms = draws.uniforms("crop", 3, 7, indices=rows, columns=4)
    for row, start in enumerate(key.tolist()):
        for column in range(4):
            expected = (mix((start + (column + 1) * GOLDEN) & MASK) >> 11) * 2.0**-53
            assert uniforms[row, column] == expected


def test_a_row_does_not_depend_on_other_rows() -> None:
    everything = draws.uniforms("crop", 0, 1, indices=np.arange(100), columns=3)
    some = draws.uniforms("crop", 0, 1, indices=np.array([17, 99, 4]), columns=3)
    assert (some == everything[[17, 99, 4]]).all()


@pytest.mark.parametrize("other", [("crop", 0, 1), ("crop", 1, 0), ("order", 0, 0), ("crop", 0), ("crop",)])
def test_another_key_gives_other_draws(other: tuple[str, ...]) -> None:
    rows = np.arange(1000)
    purpose, *key = other
    one = draws.uniforms("crop", 0, 0, indices=rows, columns=1)[:, 0]
    two = draws.uniforms(purpose, *key, indices=rows, columns=1)[:, 0]  # type: ignore[arg-type]
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    assert (one != two).all()


def test_draws_are_uniform_and_independent() -> None:
    u = draws.uniforms("crop", 0, 0, indices=np.arange(20_000), columns=6)
    assert u.min() >= 0
    assert u.max() < 1
    # Mean 1/2 and variance 1/12, within five standard errors.
    assert np.abs(u.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 20_000)
    assert np.abs(u.var(axis=0) - 1 / 12).max() < 0.005
    correlation = np.corrcoef(u.T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


def test_a_permutation_has_every_number_once_and_changes_with_its_key() -> None:
    one, two = draws.permutation(1000, "order", 0, 0), draws.permutation(1000, "order", 0, 1)
    assert sorted(one.tolist()) == list(range(1000))
    assert (one == draws.permutation(1000, "order", 0, 0)).all()
    assert (one == two).sum() < 10
