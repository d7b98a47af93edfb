"""The report stage: scores, curves, records, tables and figures of a finished experiment."""

from pathlib import Path

from mochi.config import Experiment
from mochi.layout import PUBLISHED
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.report import figures, tables
from mochi.report.collect import curves, records, scores
from mochi.storage.atomic import publishing, write_json, write_text


def run(experiment: Experiment, result: Result, published: Path = PUBLISHED) -> Path:
    """Write everything that git keeps of an experiment.

    Args:
        experiment: whose results.
        result: receives scores.csv (every number), curves.csv and matching.csv (training), records.json
            (provenance of each number), summary.{csv,md,json}, and the figures.
        published: CSV of the papers' numbers: experiment, method, task, metric, value, std, source.

    Returns:
        The table to read, summary.md.

    Raises:
        MissingResultError: a run has not been trained or evaluated.
    """
    watch = Stopwatch()
    numbers, epochs = scores(experiment), curves(experiment, "metrics.csv")
    matching = curves(experiment, "matching.csv")
    summary = tables.summarize(numbers, tables.read_published(published, experiment.name))
    with publishing(result.folder) as new:
        for name, table in (
            ("scores", numbers),
            ("curves", epochs),
            ("matching", matching),
            ("summary", summary),
        ):
            write_text(new / f"{name}.csv", table.to_csv(index=False))
        write_json(new / "records.json", records(experiment))
        write_text(new / "summary.md", tables.markdown(experiment, summary))
        write_json(new / "summary.json", tables.nested(summary))
        figures.draw(experiment, numbers, epochs, matching, new)
        write_record(new, result, watch)
    return result.folder / "summary.md"
