"""The report stage: scores, curves, records, tables, figures and the page of an experiment."""

import logging
from pathlib import Path

from mochi.config import Experiment, baseline_of
from mochi.layout import DEVIATIONS, PUBLISHED
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.provenance.wanted import figures as wanted_figures
from mochi.report import figures, page, tables
from mochi.report.analyses import chart
from mochi.report.collect import collect
from mochi.storage.atomic import publishing, write_json, write_text

logger = logging.getLogger(__name__)


def run(
    experiment: Experiment, result: Result, published: Path = PUBLISHED, deviations: Path = DEVIATIONS
) -> Path:
    """Write the files of an experiment that are stored in git.

    Missing results are listed in the page and in the log. In that case no provenance.json is written, so
    that the report is written again when they exist.

    Args:
        experiment: whose results.
        result: receives scores.csv (every number), curves.csv and matching.csv (training), records.json
            (provenance of each number), summary.{csv,md,tex,json}, a json, png and svg of each figure in
            figures/, and report.html.
        published: CSV of the papers' numbers: experiment, method, task, metric, value, std, source, table.
        deviations: list of differences from the paper, for the page.

    Returns:
        The table to read, summary.md.
    """
    watch = Stopwatch()
    collected = collect(experiment)
    for line in collected.missing:
        logger.warning("missing: %s", line)
    summary = tables.summarize(
        collected.scores, tables.read_published(published, experiment.name), baseline_of(experiment)
    )
    grids = tables.layouts(experiment, summary)
    charts = [chart(name, experiment, collected) for name in wanted_figures(experiment)]
    if collected.missing:
        charts = [each for each in charts if each.series]
    with publishing(result.folder) as new:
        for name, table in (
            ("scores", collected.scores),
            ("curves", collected.curves),
            ("matching", collected.matching),
            ("summary", summary),
        ):
            write_text(new / f"{name}.csv", table.to_csv(index=False))
        write_json(new / "records.json", collected.records)
        write_text(new / "summary.md", tables.markdown(experiment, grids))
        write_text(new / "summary.tex", tables.latex(experiment, grids))
        write_json(new / "summary.json", tables.nested(summary))
        drawn = new / "figures"
        for each in charts:
            write_json(drawn / f"{each.name}.json", each.json())
            figures.write(each, list(experiment.methods), drawn)
        write_text(
            new / "report.html", page.render(experiment, collected, grids, charts, drawn, deviations)
        )
        if not collected.missing:
            write_record(new, result, watch)
    return result.folder / "summary.md"
