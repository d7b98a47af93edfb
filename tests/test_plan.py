"""The arithmetic of a plan compared with cases worked out by hand."""

import itertools

import pytest

from mochi.plan import Seconds, makespan


def test_a_range_is_shown_in_a_suitable_unit() -> None:
    assert str(Seconds(3600, 7200)) == "1 to 2 h"
    assert str(Seconds(61, 61)) == "1 min"
    assert str(Seconds(0.5, 40)) == "0.5 to 40 s"
    assert str(Seconds(36000, 72000)) == "10 to 20 h"


def test_parallel_jobs_take_their_mean_load_or_the_longest_job() -> None:
    one = [Seconds(10, 20)] * 4
    assert makespan(one, 1) == (40, 80)
    assert makespan(one, 2) == (20, 40 * 1.25)
    assert makespan([Seconds(30, 30), Seconds(1, 1)], 2).low == 30
    assert makespan([], 2) == (0, 0)


@pytest.mark.parametrize("lengths", [(3, 5, 7, 2), (1, 1, 9), (4, 4)])
def test_no_schedule_is_shorter_than_the_lower_bound(lengths: tuple[int, ...]) -> None:
    best = min(
        max(
            sum(length for length, worker in zip(lengths, workers, strict=True) if worker == p)
            for p in range(2)
        )
        for workers in itertools.product(range(2), repeat=len(lengths))
    )
    assert makespan([Seconds(length, length) for length in lengths], 2).low <= best
