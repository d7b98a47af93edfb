"""Whatever the bytes of a file, a reader returns a value or raises an error with a message to the user."""

import random
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mochi.errors import UserError
from tests.mutations import KINDS


def fuzz(kind: str, folder: Path, mutations: int) -> None:
    """Change a valid file `mutations` times, with up to three changes at once, and read each version."""
    path, changes, read = KINDS[kind](folder)
    valid = path.read_bytes()
    read()
    refused = 0

    @settings(
        max_examples=mutations,
        database=None,
        deadline=None,
        derandomize=True,  # the same mutations each time
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**63))
    def mutated(seed: int) -> None:
        nonlocal refused
        rng, data = random.Random(seed), valid
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            try:
                data = rng.choice(changes)(data, rng)
            except (ValueError, SyntaxError, IndexError):  # the mutation cannot parse it any more
                break
        path.write_bytes(data)
        try:
            read()
        except UserError as error:
            refused += 1
            message = str(error)
            assert str(folder) in message, "the file is named"
            assert max(map(len, message.splitlines())) < 1000, "the message does not contain the whole file"

    mutated()
    assert refused > mutations // 10, "most changes are refused"
