"""The page contains every result, loads nothing, and escapes text from files."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mochi.config import parse_experiment
from mochi.provenance.wanted import reported
from mochi.report import stage
from mochi.report.page import duration
from tests.report.conftest import Report
from tests.report.made_up import CLASS, make_up, top1_of
from tests.tiny import MOCHI, TINY, changed


class Tags(HTMLParser):
    """Collects tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]


@pytest.fixture
def page(report: Report) -> str:
    return (report.folder / "results/tiny/report.html").read_text()


def test_the_page_loads_nothing_and_has_no_script(page: str) -> None:
    found = Tags(page)
    assert not {"script", "iframe", "object", "link rel=stylesheet"} & set(found.tags)
    sources = [value for name, value in found.values if name in ("src", "href")]
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert not [name for name, _ in found.values if name.startswith("on")]
    assert "default-src 'none'" in page
    assert "url(" not in page


def test_text_from_files_is_escaped(page: str) -> None:
    assert CLASS not in page
    assert "&lt;script&gt;alert(&#39;class&#39;)&lt;/script&gt;" in page


def test_every_link_has_a_target(page: str) -> None:
    found = Tags(page).values
    targets = {value for name, value in found if name == "id"}
    links = {value.removeprefix("#") for name, value in found if name == "href" and value.startswith("#")}
    assert links <= targets
    assert f"{MOCHI}--linear" in links, "from a cell to its provenance"


def test_the_page_has_every_section(page: str) -> None:
    for expected in (
        "51.5 ± 2.1", "Most confused", "Training runs", "Provenance of each number",
        "A pair is of two different negatives (why).",
        "pooled features (64 dimensions): alignment 0.500, uniformity -1.000",
        f"{MOCHI} seed 0 knn", "settings <code>", "random-init seed 0 pretrain",
        "prefers-color-scheme: dark",
    ):  # fmt: skip
        assert expected in page, expected
    text = re.sub(r"<[^>]*>", " ", page)
    assert re.search(r"pretrain +3 +\d", text), "number of runs and their time"


def test_an_experiment_with_only_the_random_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = TINY | {"methods": {"random-init": {"objective": "none"}}}
    experiment = parse_experiment(content, "x.yaml")
    make_up(experiment, top1_of({("random-init", 0): 10.0}))
    stage.run(experiment, reported(experiment))
    page = Path("results/tiny/report.html").read_text()
    assert "Missing" not in page
    assert "Training runs" not in page
    assert "random-init" in page


def test_a_title_from_the_file_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = changed("title", "<script>alert(1)</script> & more")
    experiment = parse_experiment(content | {"methods": {"random-init": {"objective": "none"}}}, "x.yaml")
    make_up(experiment, top1_of({("random-init", 0): 10.0}), with_records=False)
    stage.run(experiment, reported(experiment))
    page = Path("results/tiny/report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.5, 90, 5400)] == ["0.5 s", "1.5 min", "1.5 h"]
