"""The results that an experiment wants, and whether those on disk are current: every reason to compute
one again.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi.config import DetectionSet, Experiment
from mochi.config.datasets import Folder
from mochi.provenance import wanted
from mochi.provenance.fingerprint import file_digest
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result, differences
from tests.detection.sets import small_set
from tests.tiny import MOCHI, with_protocol

SCENES = {"image_size": 64, "num_train": 6, "num_test": 3, "seed": 0}


@pytest.fixture
def result(tmp_path: Path) -> Result:
    """An evaluation that was just computed."""
    encoder, data, folder = tmp_path / "encoder", tmp_path / "data", tmp_path / "out"
    encoder.write_bytes(b"weights")
    data.write_bytes(b"images")
    folder.mkdir()
    (folder / "metrics.json").write_text('{"top1": 50.0}')
    result = Result(
        stage="knn",
        label="moco-v2 seed 0 knn",
        folder=folder,
        outputs=("metrics.json",),
        settings={"seed": 0, "protocol": {"k": 5, "temperature": 0.07}},
        inputs={"encoder": encoder, "data": data},
        modules=("mochi.evaluation.tasks.knn",),
    )
    write_record(folder, result, Stopwatch())
    return result


def edit(result: Result, **changes: Any) -> None:
    """Change keys of provenance.json."""
    record = json.loads(result.record.read_text())
    result.record.write_text(json.dumps(record | changes))


def test_a_new_result_is_current(result: Result) -> None:
    assert result.why_stale() is None


def test_a_result_that_was_never_computed_is_missing(result: Result) -> None:
    result.record.unlink()
    assert result.why_stale() == "missing"
    assert replace(result, folder=result.folder / "nowhere").why_stale() == "missing"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: '{"settings": {}}',
        lambda text: text.replace('"code_digest"', '"code"'),
        lambda text: text.replace('"sha256"', '"md5"'),
        lambda text: json.dumps(json.loads(text) | {"inputs": []}),
        lambda text: json.dumps(json.loads(text) | {"outputs": 3}),
        lambda text: json.dumps(json.loads(text) | {"accepted_code": [[]]}),
        lambda text: "\udcff",
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_record_is_named(result: Result, damage: Callable[[str], str]) -> None:
    text = damage(result.record.read_text())
    result.record.write_bytes(text.encode(errors="surrogateescape"))
    reason = result.why_stale()
    assert reason is not None
    assert reason.startswith(f"{result.record} cannot be read (")


def test_a_folder_named_provenance_json_is_named(result: Result) -> None:
    result.record.unlink()
    result.record.mkdir()
    reason = result.why_stale()
    assert reason is not None
    assert "cannot be read (IsADirectoryError" in reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"seed": 0, "protocol": {"k": 6, "temperature": 0.07}},
            "settings: protocol.k 5 -> 6",
        ),
        (
            {"seed": 1, "protocol": {"k": 5}},
            "settings: protocol.temperature 0.07 -> (default); seed 0 -> 1",
        ),
        (
            {"seed": 0, "protocol": {"k": 5, "temperature": 0.07, "rule": "all"}},
            'settings: protocol.rule (default) -> "all"',
        ),
        ({"seed": 0, "protocol": [5]}, 'settings: protocol {"k": 5, "temperature": 0.07} -> [5]'),
    ],
)
def test_a_changed_setting_is_named_with_both_values(
    result: Result, settings: dict[str, Any], reason: str
) -> None:
    assert replace(result, settings=settings).why_stale() == reason


def test_changed_code_is_stale_until_it_is_accepted(result: Result) -> None:
    now = result.code_digest
    edit(result, code_digest="0" * 16)
    assert result.why_stale() == wanted.CODE_CHANGED
    edit(result, accepted_code=["1" * 16])
    assert result.why_stale() == wanted.CODE_CHANGED
    edit(result, accepted_code=["1" * 16, now])
    assert result.why_stale() is None
    assert replace(result, modules=("mochi.contrast",)).why_stale() == wanted.CODE_CHANGED


def test_other_reasons_come_before_changed_code(result: Result) -> None:
    """`mochi adopt --accept-code` keeps only results for which changed code is the one reason."""
    edit(result, code_digest="0" * 16)
    (result.folder / "metrics.json").write_text('{"top1": 99.0}')
    assert result.why_stale() != wanted.CODE_CHANGED


def test_a_changed_missing_new_or_dropped_input_is_named(result: Result) -> None:
    encoder = result.inputs["encoder"]
    encoder.write_bytes(b"other weights")
    assert result.why_stale() == f"input: {encoder} changed"
    encoder.unlink()
    assert result.why_stale() == f"input: {encoder} is missing"
    encoder.write_bytes(b"weights")
    assert result.why_stale() is None
    one = {"data": result.inputs["data"]}
    assert replace(result, inputs=one).why_stale() == "input: encoder is no longer an input"
    more = {**result.inputs, "labels": encoder}
    assert replace(result, inputs=more).why_stale() == "input: labels is now an input"


def test_an_input_may_move(result: Result, tmp_path: Path) -> None:
    moved = result.inputs["encoder"].rename(tmp_path / "moved")
    assert replace(result, inputs={**result.inputs, "encoder": moved}).why_stale() is None


def test_an_edited_or_missing_output_is_named(result: Result) -> None:
    metrics = result.folder / "metrics.json"
    metrics.write_text('{"top1": 99.0}')
    assert str(result.why_stale()).startswith(f"{metrics} is not the file that was computed")
    metrics.unlink()
    assert result.why_stale() == f"missing: {metrics}"


def test_an_output_without_provenance_is_not_current(result: Result) -> None:
    extra = result.folder / "figure.png"
    extra.write_bytes(b"from elsewhere")
    more = replace(result, outputs=("metrics.json", "figure.png"))
    assert str(more.why_stale()).startswith(f"{extra} is not the file that was computed")


def test_checking_changes_no_file(result: Result, tmp_path: Path) -> None:
    def state() -> dict[Path, tuple[int, int, str]]:
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino, file_digest(path))
            for path in sorted(tmp_path.rglob("*"))
            if path.is_file()
        }

    before = state()
    result.why_stale()
    replace(result, settings={}).why_stale()
    replace(result, folder=tmp_path / "new folder").why_stale()
    assert state() == before
    assert not (tmp_path / "new folder").exists()


def with_detection(tiny: Experiment, **sets: DetectionSet) -> Experiment:
    evaluation = tiny.evaluation.model_copy(update={"detection": sets})
    return tiny.model_copy(update={"evaluation": evaluation})


def scene_set(path: str, **changes: Any) -> DetectionSet:
    data = {"path": path, "train": ["VOC/train"], "test": ["VOC/test"], "scenes": SCENES}
    return small_set(Path("VOC"), data=data).model_copy(update=changes)


def test_results_are_ordered_after_their_inputs(tiny: Experiment) -> None:
    experiment = with_detection(
        tiny, few=scene_set("data/few", methods=["random-init"]), many=scene_set("data/many")
    )
    found = wanted.results(experiment)
    labels = [result.label for result in found]
    assert labels == [
        "data set photo-patches-tiny", "scenes data/few", "scenes data/many",
        "random-init seed 0 pretrain", f"{MOCHI} seed 0 pretrain", f"{MOCHI} seed 1 pretrain",
        "random-init seed 0 linear", f"{MOCHI} seed 0 linear", f"{MOCHI} seed 1 linear",
        "random-init seed 0 knn", f"{MOCHI} seed 0 knn", f"{MOCHI} seed 1 knn",
        "random-init seed 0 detection-few",
        "random-init seed 0 detection-many", f"{MOCHI} seed 0 detection-many",
        f"{MOCHI} seed 1 detection-many",
        "random-init seed 0 analysis", f"{MOCHI} seed 0 analysis", f"{MOCHI} seed 1 analysis", "report",
    ]  # fmt: skip
    written = {result.folder / name: index for index, result in enumerate(found) for name in result.outputs}
    written |= {result.record: index for index, result in enumerate(found)}
    for index, result in enumerate(found):
        for path in result.inputs.values():
            assert written.get(path, -1) < index, f"{result.label} reads {path}"
            assert path in written or path.parent == Path("workflow"), path


def test_every_result_has_its_own_folder(tiny: Experiment) -> None:
    experiment = with_detection(tiny, few=scene_set("data/few"), many=scene_set("data/many"))
    folders = [result.folder for result in wanted.results(experiment)]
    assert len(set(folders)) == len(folders)


def test_scenes_that_detection_sets_share_are_made_once(tiny: Experiment) -> None:
    experiment = with_detection(tiny, few=scene_set("data/same"), many=scene_set("data/same"))
    assert list(wanted.scenes(experiment)) == [Path("data/same")]
    assert wanted.scenes(with_detection(tiny, few=small_set(Path("own/VOC")))) == {}


def test_the_inputs_of_a_detection_set_are_its_lists_of_images(tiny: Experiment) -> None:
    experiment = with_detection(tiny, few=small_set(Path("own/VOC")))
    result = wanted.evaluated(experiment, MOCHI, 0, "detection-few")
    assert set(result.inputs.values()) == {
        Path("results/tiny/encoders", MOCHI, "seed0/encoder.safetensors"),
        Path("own/VOC/ImageSets/Main/train.txt"),
        Path("own/VOC/ImageSets/Main/test.txt"),
    }


def test_an_untrained_encoder_depends_on_no_data_and_no_training_code(tiny: Experiment) -> None:
    result = wanted.pretrained(tiny, "random-init", 0)
    assert result.inputs == {}
    assert not any("contrast" in name or "pretraining" in name for name in result.modules)
    trained = wanted.pretrained(tiny, MOCHI, 0)
    assert list(trained.inputs.values()) == [Path("data/photo-patches-tiny/manifest.json")]
    assert {"mochi.contrast.loss", "mochi.pretraining.loop"} <= set(trained.modules)


def test_other_images_are_another_data_set() -> None:
    own = Folder(source="folder", name="mine", path="images")
    digests = {
        wanted.prepared(own, Path("data/mine"), listing).settings_digest for listing in ("", "a", "b")
    }
    assert len(digests) == 3


def test_the_report_is_stale_when_a_row_or_an_evaluation_is_added_or_removed(tiny: Experiment) -> None:
    methods = {"random-init": tiny.methods["random-init"]}
    digests = [
        wanted.reported(experiment).settings_digest
        for experiment in (
            tiny,
            tiny.model_copy(update={"methods": methods}),
            tiny.model_copy(update={"title": "Another title"}),
            tiny.model_copy(update={"evaluation": tiny.evaluation.model_copy(update={"knn": None})}),
        )
    ]
    assert len(set(digests)) == 4
    # Other numbers are inputs, as files.
    assert wanted.reported(with_protocol("knn", k=3)).settings_digest == digests[0]


def test_only_figures_with_data_are_wanted(tiny: Experiment) -> None:
    def figures(methods: dict[str, Any], **evaluation: Any) -> list[str]:
        evaluations = tiny.evaluation.model_copy(update=evaluation)
        return wanted.figures(tiny.model_copy(update={"methods": methods, "evaluation": evaluations}))

    untrained, supervised = {"random-init": {"objective": "none"}}, {"above": {"objective": "supervised"}}
    none = {"linear": None, "knn": None}
    labelled = "alignment-uniformity"
    assert wanted.figures(tiny) == [
        "accuracy", "loss", "proxy-task", "matching", "false-negatives", "false-parents", labelled
    ]  # fmt: skip
    assert figures(untrained) == ["accuracy", labelled]
    assert figures(untrained, **none) == []
    assert figures(untrained | supervised) == ["accuracy", "loss", labelled]
    assert figures(supervised, **none) == ["loss", labelled]
    assert figures({"moco-v2": {}}, **none) == ["loss", "proxy-task", "matching"]
    assert figures({"moco-v2": {"matching_epochs": []}}, **none) == ["loss", "proxy-task"]


def test_differences_name_leaves_and_items_of_long_lists() -> None:
    runs = [["moco-v2", seed] for seed in range(6)]
    changed = [*runs[1:], *(["mochi", seed] for seed in range(5))]
    assert differences({"runs": runs, "a": {"b": 1, "c": 2}}, {"runs": changed, "a": {"b": 3, "c": 2}}) == [
        "a.b 1 -> 3",
        'runs: added ["mochi", 0], ["mochi", 1], ["mochi", 2] and 2 more, removed ["moco-v2", 0]',
    ]
    assert differences(runs, runs[::-1], "runs") == ["runs: in another order"]
    assert differences({"seeds": [0, 1]}, {"seeds": [0]}) == ["seeds [0, 1] -> [0]"]
