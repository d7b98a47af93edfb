"""The documents compared with the project: links, results, the picture of the workflow."""

import re
from pathlib import Path

import pandas as pd
import pytest

from tests.project import ROOT, snakemake

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_targets(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def shown_tables(document: Path) -> list[tuple[str, pd.DataFrame]]:
    """The tables between `<!-- results/NAME/summary.md -->` and `<!-- end -->`, with that path."""
    blocks = re.findall(r"<!-- (results/\S+) -->\n(.*?)<!-- end -->", document.read_text(), re.DOTALL)
    return [(path, table) for path, text in blocks for table in tables(text)]


def tables(text: str) -> list[pd.DataFrame]:
    """The Markdown tables of a text, a column for each header, indexed by the first."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [
            [cell.strip() for cell in line.strip("|\n ").split("|")] for line in lines.splitlines()
        ]
        found.append(pd.DataFrame(rows, columns=header).set_index(header[0]))
    return found


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if shown_tables(d)], ids=lambda path: path.name)
def test_results_in_documents_are_those_of_the_summary(document: Path) -> None:
    """A document may leave out rows and columns; what it shows is equal, cell by cell."""
    for path, shown in shown_tables(document):
        summary = tables((ROOT / path).read_text())
        assert any(
            set(shown.columns) <= set(table.columns)
            and set(shown.index) <= set(table.index)
            and table.loc[shown.index, shown.columns].equals(shown)
            for table in summary
        ), f"{path} has no such table:\n{shown}"


def test_the_readme_shows_results() -> None:
    assert len(shown_tables(ROOT / "README.md")) >= 2


def test_the_named_protocols_are_those_of_the_experiments() -> None:
    section = (
        (ROOT / "docs/evaluation.md").read_text().partition("## Named protocols\n")[2].partition("\n## ")[0]
    )
    used = {
        name
        for file in (ROOT / "config").glob("*.yaml")
        for name in re.findall(r"^ +protocol: ([\w-]+)", file.read_text(), re.MULTILINE)
    }
    assert set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)) == used


def test_the_picture_of_the_workflow_is_up_to_date() -> None:
    done = snakemake(ROOT, "--rulegraph", "dot", "--quiet")
    assert done.returncode == 0, done.stderr
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', done.stdout))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", done.stdout)}
    svg = (ROOT / "docs/workflow.svg").read_text()
    labels = dict(re.findall(r"<!-- (\d+) -->.*?<text[^>]*>(\w+)</text>", svg, re.DOTALL))
    arrows = re.findall(r"<!-- (\d+)&#45;&gt;(\d+) -->", svg)
    assert {(labels[a], labels[b]) for a, b in arrows} == edges
