"""The documents compared with the project: links, results, the picture of the workflow."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_targets(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_results_in_the_readme_are_those_of_the_summary() -> None:
    """Complete tables of the summary, in its order."""
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("<!-- results/embedded/summary.md -->\n")[1].split("<!-- end -->")[0]
    summary = (ROOT / "results/embedded/summary.md").read_text()
    shown_tables, tables = (re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) for text in (shown, summary))
    assert len(shown_tables) >= 2
    assert shown_tables == tables[: len(shown_tables)]


def test_the_picture_of_the_workflow_is_up_to_date() -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "dot", "--quiet"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', done.stdout))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", done.stdout)}
    drawn = (ROOT / "docs/workflow.svg").read_text()
    labels = dict(re.findall(r"<!-- (\d+) -->.*?<text[^>]*>(\w+)</text>", drawn, re.DOTALL))
    arrows = re.findall(r"<!-- (\d+)&#45;&gt;(\d+) -->", drawn)
    assert {(labels[a], labels[b]) for a, b in arrows} == edges
