"""A loading worker is killed, stopped or fails: the run ends and says why.

`.ci/test_watchdog.py` tests the same with ranks.
"""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mochi.errors import UserError
from mochi.runtime import watchdog
from mochi.runtime.watchdog import Pulse, watched


class Items(Dataset[object]):
    """A data set in which something happens to the worker at the third item."""

    def __init__(self, event: str, pulse: Pulse) -> None:
        self.event, self.pulse = event, pulse

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> object:
        if index == 3:
            if self.event == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.event == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.event == "cannot be sent":
                return lambda: None  # without pickling it
            if self.event == "slow":
                for _ in range(8):
                    time.sleep(0.4)
                    self.pulse.beat()
        return torch.tensor(index)


def loaded(event: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(watchdog, "WORKER_SECONDS", 2.0)
    pulse = Pulse()
    loader = DataLoader(
        Items(event, pulse),
        batch_size=None,
        num_workers=1,
        prefetch_factor=1,
        timeout=1,
        worker_init_fn=watchdog.end_worker_that_cannot_send,
    )
    return [int(item) for item in watched(loader, pulse)]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("killed", ""),
        ("cannot be sent", "error: loading worker 0 cannot send images: AttributeError"),
    ],
)
def test_a_worker_that_dies_is_reported(
    event: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError) as caught:
        loaded(event, monkeypatch)
    text = watchdog.reason(caught.value)
    assert text is not None
    assert "a loading worker ended" in text
    assert message in capfd.readouterr().err


# torch may notice the killed worker while it removes the loader; that error cannot be caught.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="1 loading workers did nothing for 2 s"):
        loaded("stopped", monkeypatch)


def test_a_slow_worker_is_not_a_hanging_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded("slow", monkeypatch) == list(range(8))


def test_other_errors_keep_their_traceback() -> None:
    assert watchdog.reason(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert watchdog.reason(RuntimeError()) is None
