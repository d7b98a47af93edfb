"""Seeds are functions of purpose and key that differ in the bits that generators read."""

from itertools import product

import numpy as np
import torch

from mochi.runtime.seeding import generator, numpy_generator, seed_of


def test_equal_purposes_and_keys_give_equal_draws() -> None:
    one, again = (torch.rand(4, generator=generator("shuffle", 1, 2)) for _ in range(2))
    assert torch.equal(one, again)
    assert np.array_equal(*(numpy_generator("shuffle", 1, 2).random(4) for _ in range(2)))


def test_every_part_of_the_key_changes_the_draws() -> None:
    """torch's CPU generator reads the low 32 bits of a seed; keys of realistic size must all reach them."""
    keys = list(product(("shuffle", "mix"), (0, 1, 2**31), (0, 1, 50_000), (0, 7)))
    firsts = {int(torch.randint(2**62, (), generator=generator(*key))) for key in keys}
    assert len(firsts) == len(keys)
    assert len({numpy_generator(*key).random() for key in keys}) == len(keys)


def test_keys_are_not_concatenated() -> None:
    assert len({seed_of("a", 1, 23), seed_of("a", 12, 3), seed_of("a", 123), seed_of("a1", 23)}) == 4


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of("shuffle keys", 0, 1) == 10071634938220288174
    assert 0 <= seed_of("x") < 2**64
