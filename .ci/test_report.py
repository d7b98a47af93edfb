"""The report in a browser: no console message, no request outside the file, wide and narrow."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mochi.config import Experiment, load_experiment
from mochi.provenance.wanted import analyzed, evaluated, reported
from mochi.report import stage
from tests.report.made_up import CLASS, fine_tunings, is_detection, make_up

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the embedded experiment: made-up numbers, pictures of noise, names that contain
    code.
    """
    folder = tmp_path_factory.mktemp("report")
    experiment = load_experiment(ROOT / "config/config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_up(experiment, metrics, with_records=False)
        draw_pictures(experiment)
        stage.run(experiment, reported(experiment))
    return folder / "results/embedded/report.html"


def metrics(method: str, seed: int, task: str) -> dict[str, Any]:
    del method
    return fine_tunings(40.0 + seed, 41.0) if is_detection(task) else {"top1": 50.0 + seed}


def draw_pictures(experiment: Experiment) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    for method in experiment.methods:
        folder = analyzed(experiment, method, 0).folder
        noise.save(folder / "neighbours.jpg")
        noise.save(folder / "map.jpg")
        for name in experiment.evaluation.detection:
            noise.save(evaluated(experiment, method, 0, f"detection-{name}").folder / "detections.png")


def browse(
    page: Path, folder: Path, *options: str, width: int = 1280, dark: bool = False
) -> tuple[str, str]:
    """Open the page in headless Chromium; returns what it prints and its log."""
    assert BROWSER is not None, "chromium is not installed"
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={folder / 'net.json'}",
        f"--window-size={width},3000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout, done.stderr


def requests(log: Path) -> set[str]:
    """URLs that a page requested; requests of the browser itself have no origin."""
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    return {
        event["url"]
        for event in events
        if "url" in event and event.get("initiator", "not an origin") != "not an origin"
    }


def test_no_error_and_no_request(page: Path, tmp_path: Path) -> None:
    printed, log = browse(page, tmp_path, "--dump-dom")
    assert "Provenance of each number" in printed
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    assert requests(tmp_path / "net.json") <= {page.as_uri()}


def test_the_log_shows_forbidden_requests(page: Path, tmp_path: Path) -> None:
    """So the test above can fail: the same page with a script and a picture from another place."""
    changed = tmp_path / "changed.html"
    additions = "<script>console.error('ran')</script><img src='http://localhost:9/x.png'>"
    changed.write_text(page.read_text().replace("</main>", f"{additions}</main>"))
    _, log = browse(changed, tmp_path, "--dump-dom")
    lines = [line for line in log.splitlines() if "CONSOLE" in line]
    assert len(lines) >= 2, log
    assert all("Content Security Policy" in line for line in lines), (
        "the policy blocks scripts and requests"
    )


def test_the_log_shows_a_request(page: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    without_policy = re.sub("<meta http-equiv[^>]*>", "", page.read_text())
    changed.write_text(without_policy.replace("</main>", "<img src='http://localhost:9/x.png'></main>"))
    browse(changed, tmp_path, "--dump-dom")
    assert "http://localhost:9/x.png" in requests(tmp_path / "net.json")


def test_names_are_shown_unchanged(page: Path, tmp_path: Path) -> None:
    printed, _ = browse(page, tmp_path, "--dump-dom")
    assert CLASS.replace("<", "&lt;").replace(">", "&gt;") in printed


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_wide_and_narrow(width: int, dark: bool, page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    browse(page, tmp_path, f"--screenshot={picture}", width=width, dark=dark)
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("L"))
    assert pixels.shape == (3000, width)
    assert (np.median(pixels[:, :8]) < 64) == dark, "the margin has the colour of the page"
    # Nothing is wider than the page: wide tables scroll in their own box.
    assert pixels[:, -4:].std() < 16
    assert pixels.std() > 20


def test_the_page_is_small(page: Path) -> None:
    assert page.stat().st_size < 8e6
