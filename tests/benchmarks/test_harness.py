"""The harness on alternatives with known times, which set the clock themselves."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Measurement, compare, compare_in_turn, table


class Clock:
    """A clock that an alternative advances when it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, ""
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def takes(self, name: str, *seconds: float) -> Callable[[], None]:
        """An alternative that takes these times, one for each call."""
        left = iter(seconds)

        def work() -> None:
            self.calls += name
            self.now += next(left)

        return work


def test_alternatives_are_interleaved_and_ratios_are_within_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In two rounds the machine is slow: times vary, ratios vary less."""
    clock = Clock(monkeypatch)
    works = {"a": clock.takes("a", 100, 1, 8, 2), "b": clock.takes("b", 100, 2, 24, 4)}
    base, other = compare(works, rounds=3)
    assert clock.calls == "ab" + 3 * "ab"
    assert base == Measurement("a", [1, 8, 2], [1, 1, 1], None)
    assert other == Measurement("b", [2, 24, 4], [2, 3, 2], None)


def test_each_alternative_is_freed_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is several calls after some that are not timed; seconds are those of one."""
    clock, alive = Clock(monkeypatch), []

    class Alternative:
        def __init__(self, name: str, *seconds: float) -> None:
            assert not alive
            alive.append(name)
            untimed = [100.0] * harness._CALLS_BEFORE
            timed = [each for each in seconds for _ in range(harness._CALLS)]
            self._work = clock.takes(name, *untimed, *timed)

        def __call__(self) -> None:
            self._work()

        def __del__(self) -> None:
            alive.clear()

    makes = {"a": partial(Alternative, "a", 1, 8), "b": partial(Alternative, "b", 2, 24)}
    base, other = compare_in_turn(makes, rounds=2, device=torch.device("cpu"))
    calls = harness._CALLS_BEFORE + 2 * harness._CALLS
    assert clock.calls == "a" * calls + "b" * calls
    assert base == Measurement("a", [1, 8], [1, 1], None)
    assert other == Measurement("b", [2, 24], [2, 3], None)


def test_the_table_shows_medians_ranges_and_rates() -> None:
    rows = [
        Measurement("ours", [1, 8, 2], [1, 1, 1], None),
        Measurement("theirs", [2, 24, 4], [2, 3, 2], None),
    ]
    header, ours, theirs, last = table(rows, items=512, unit="views")
    assert "memory" not in header
    assert " ".join(theirs.split()) == "theirs 4.0000 (2.0000 to 24.0000) 128 2.00 (2.00 to 3.00)"
    assert ours.endswith("1.00 (1.00 to 1.00)")
    assert last == "ratios to: ours"


def test_the_table_shows_memory_as_a_ratio() -> None:
    rows = [Measurement("a", [1], [1], 200_000_000), Measurement("b", [1], [1], 50_000_000)]
    _, _, second, _ = table(rows)
    assert second.split()[-3:] == ["50", "MB", "0.25"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_includes_memory_that_the_call_frees() -> None:
    """40 MB that are freed when the call returns."""

    def work() -> None:
        torch.ones(10_000_000).sum()

    nothing, allocates = compare({"nothing": lambda: None, "allocates": work}, rounds=1, memory=True)
    assert nothing.peak_bytes is not None
    assert allocates.peak_bytes is not None
    assert nothing.peak_bytes < 5e6
    assert 35e6 < allocates.peak_bytes < 60e6
