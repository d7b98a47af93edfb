"""`explain` traces a number to the files behind it and checks their digests."""

import json
import re
from pathlib import Path

import pytest

from mochi.config import Experiment
from mochi.errors import UserError
from mochi.layout import Paths
from mochi.provenance import wanted
from mochi.provenance.fingerprint import file_digest
from mochi.provenance.wanted import RECORD, reported
from mochi.report import stage
from mochi.report.collect import MissingResultError
from mochi.report.explain import explain
from tests.detection.sets import small_set
from tests.report.conftest import Report
from tests.report.made_up import fine_tunings, make_up
from tests.tiny import MOCHI, with_protocol


def test_every_file_is_named_and_its_digest_checked(tiny: Experiment, reported_results: Path) -> None:
    lines = explain(tiny, MOCHI, "linear")
    text = "\n".join(lines)
    assert lines[0] == f"{MOCHI}, linear top1: 51.50 ± 2.12 over 2 seeds"
    assert "seed 0: top1 50.00" in lines
    assert "seed 1: top1 53.00" in lines
    for seed in (0, 1):
        encoder = Paths("tiny").encoder(MOCHI, seed)
        assert f"{encoder} sha256 {file_digest(encoder)[:16]} (unchanged)" in text
    # Two seeds, two stages each: every stage reads the data, evaluations read an encoder too.
    assert len(re.findall(r"read \w+: .* \(unchanged\)", text)) == 6
    assert len(re.findall(r"code [0-9a-f]{16} \(unchanged\)", text)) == 4
    assert len(re.findall(r"settings [0-9a-f]{16} \(unchanged\)", text)) == 4
    assert len(re.findall(r"torch \d", text)) == 4
    assert "CHANGED" not in text

    encoder.write_bytes(b"another encoder")
    Path("data", tiny.dataset.name, "manifest.json").unlink()
    text = "\n".join(explain(tiny, MOCHI, "linear"))
    assert text.count("(CHANGED)") == 1
    assert text.count("(not found)") == 4


def test_a_single_run_has_no_standard_deviation(tiny: Experiment, report: Report) -> None:
    assert explain(tiny, "random-init", "knn")[0] == "random-init, knn top1: 10.00, one seed"


def test_settings_changed_since_the_result_are_shown(report: Report) -> None:
    text = "\n".join(explain(with_protocol("knn", k=7), MOCHI, "knn"))
    assert len(re.findall(r"settings [0-9a-f]{16} \(CHANGED\)", text)) == 2  # not those of pretraining
    assert len(re.findall(r"settings [0-9a-f]{16} \(unchanged\)", text)) == 2


def test_code_that_was_accepted_or_changed_between_resumes_is_shown(
    tiny: Experiment, reported_results: Path
) -> None:
    file = Paths("tiny").results / "records.json"
    records = json.loads(file.read_text())
    result = wanted.pretrained(tiny, "random-init", 0)
    record = records[str(result.folder)]
    record |= {"code_digest": "c" * 16, "code_digests": ["a" * 16, "c" * 16]}
    file.write_text(json.dumps(records))
    text = "\n".join(explain(tiny, "random-init", "knn"))
    assert f"code {'c' * 16} (CHANGED; resumed after a code change: {'a' * 16}), commit" in text
    record["accepted_code"] = [result.code_digest]
    file.write_text(json.dumps(records))
    assert "(CHANGED, accepted by the user;" in "\n".join(explain(tiny, "random-init", "knn"))


@pytest.mark.parametrize(
    ("method", "task", "message"),
    [
        ("mochi", "knn", "method: found 'mochi'; tiny has: random-init"),
        (MOCHI, "top1", "tiny has: linear, knn"),
    ],
)
def test_an_unknown_method_or_task_is_refused(
    tiny: Experiment, report: Report, method: str, task: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        explain(tiny, method, task)


def test_a_missing_report_is_refused(tiny: Experiment, results: Path) -> None:
    with pytest.raises(
        MissingResultError,
        match=r"records\.json: not found; run `snakemake .*records\.json --configfile FILE` first",
    ):
        explain(tiny, MOCHI, "knn")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("scores.csv", b"", "found no column method"),
        ("scores.csv", b"a,b\n1,2\n", "found no column method"),
        (
            "scores.csv",
            b"method,seed,task,metric,fine_tuning,value\nx,0,knn,top1,,y\n",
            "column value: found 'y'",
        ),
        ("scores.csv", b"\xff\xfe\x00", "cannot be read"),
        ("records.json", b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_report_is_refused(
    tiny: Experiment, reported_results: Path, name: str, content: bytes, reason: str
) -> None:
    (Paths("tiny").results / name).write_bytes(content)
    with pytest.raises(MissingResultError, match=rf"{name}: .*{reason}.*compute it again"):
        explain(tiny, MOCHI, "knn")


def with_detection(tiny: Experiment, seeds: list[int]) -> Experiment:
    """One row with a detection set, and nothing else."""
    sets = {"detection": {"few": small_set(Path("few/VOC"))}, "linear": None, "knn": None}
    evaluation = tiny.evaluation.model_copy(update=sets)
    return tiny.model_copy(update={"methods": {"moco-v2": {}}, "evaluation": evaluation, "seeds": seeds})


def test_the_deviation_of_several_encoders_is_that_of_the_table(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = with_detection(tiny, [0, 1])
    make_up(experiment, lambda method, seed, task: fine_tunings(40.0 + seed, 44.0 + seed))
    stage.run(experiment, reported(experiment))
    assert explain(experiment, "moco-v2", "detection-few")[0].endswith("42.50 ± 0.71 over 2 encoders")
    assert "42.5 ± 0.7" in (Paths("tiny").results / "summary.md").read_text()


def test_a_detection_set_shows_each_fine_tuning(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = with_detection(tiny, [0])
    make_up(experiment, lambda method, seed, task: fine_tunings(40.0, 42.0))
    record = Paths("tiny").evaluation("moco-v2", 0, "detection-few") / RECORD
    content = json.loads(record.read_text()) | {
        "command": ["mochi", "detect", "few"],
        "git": {"commit": "a" * 40, "dirty": True},
        "hardware": {"cpu": "a", "gpus": ["H100", "H100"]},
        "wall_seconds": 3.0,
    }
    record.write_text(json.dumps(content))
    stage.run(experiment, reported(experiment))
    lines = explain(experiment, "moco-v2", "detection-few")
    assert lines[0] == "moco-v2, detection-few AP50: 41.00 ± 1.41 over 2 fine-tunings"
    assert "seed 0: AP50 40.00 and 42.00, AP 20.00 and 20.00" in lines
    assert "  moco-v2 seed 0 detection-few: mochi detect few" in lines
    text = "\n".join(lines)
    assert "commit aaaaaaaaaaaa with uncommitted changes" in text
    assert "on H100, H100; python" in text
    assert "took 3.0 s" in text
