"""`mochi check` compared with the stages: they accept what it passes, and it names what they refuse.

Each of 30 changed experiments is checked and prepared; then every stage runs until it would refuse:
objectives are built, steps counted, labels and annotations read.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mochi.config import Experiment, Training, all_runs, load_experiment, pretrain_run, probe_run, probes
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.views.loading import steps_per_epoch
from mochi.detection.annotations import for_training
from mochi.detection.check_images import check_images
from mochi.detection.scenes import _PatchSampler
from mochi.detection.sets import read_splits
from mochi.encoders.files import load_encoder
from mochi.errors import UserError
from mochi.evaluation.features import Frozen
from mochi.preflight import _gpus, check
from mochi.pretraining.objectives import make_objective

TINY = Path(__file__).parents[1] / "tests/tiny.yaml"
SET = {
    "data": {
        "format": "voc",
        "path": "things",
        "train": ["VOC/train"],
        "test": ["VOC/val"],
        "classes": ["thing"],
        "interpolation": "all-point",
        "broken_objects": "fail",
        "empty_images": "keep",
    },
    "model": {
        "masks": False,
        "anchor_sizes": [16],
        "anchor_ratios": [1.0],
        "rpn_batch": 8,
        "proposals_train": [20, 10],
        "proposals_test": [20, 10],
        "roi_size": 4,
        "roi_batch": 8,
        "roi_positive": 0.5,
        "score_threshold": 0.05,
        "max_detections": 5,
    },
    "training": {
        "mode": "finetune",
        "seeds": [0],
        "lr": [0.01],
        "lr_batch_size": 2,
        "batch_size": 2,
        "micro_batch": 2,
        "iterations": 2,
        "warmup_iterations": 0,
        "schedule": "cosine",
        "momentum": 0.9,
        "weight_decay": 0.0,
        "train_sizes": [32],
        "test_size": 32,
        "max_size": 64,
        "flip": True,
        "precise_bn_batches": 1,
    },
}


def image(path: Path, number: int, width: int = 20, height: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (number % 256, number // 256, 0)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 40 and 8 images; a VOC set of four images."""
    root = tmp_path_factory.mktemp("checked")
    for split, count in (("train", 20), ("val", 4)):
        for label in ("a", "b"):
            for number in range(count):
                image(root / f"images/{split}/{label}/{number}.png", number)
    for number in range(4):
        image(root / f"things/VOC/JPEGImages/{number}.jpg", number)
        annotation(root, number)
    (root / "things/VOC/ImageSets/Main").mkdir(parents=True)
    (root / "things/VOC/ImageSets/Main/train.txt").write_text("0\n1\n")
    (root / "things/VOC/ImageSets/Main/val.txt").write_text("2\n3\n")
    return root


def annotation(root: Path, number: int, name: str = "thing", xmax: int = 12, width: int = 20) -> None:
    folder = root / "things/VOC/Annotations"
    folder.mkdir(exist_ok=True)
    (folder / f"{number}.xml").write_text(
        f"<annotation><size><width>{width}</width><height>20</height></size><object><name>{name}</name><bndbox>"
        f"<xmin>4</xmin><ymin>4</ymin><xmax>{xmax}</xmax><ymax>14</ymax></bndbox></object></annotation>"
    )


Change = Callable[[dict[str, Any], Path], object]


def set_key(path: str, value: Any) -> Change:
    """Set one key of the experiment."""

    def change(content: dict[str, Any], root: Path) -> None:
        *above, last = path.split(".")
        for key in above:
            content = content[key]
        content[last] = value

    return change


def supervised(content: dict[str, Any], root: Path) -> None:
    content["methods"]["supervised"] = {"objective": "supervised", "lr": 0.1}


def without_labels(content: dict[str, Any], root: Path) -> None:
    for split in ("train", "val"):
        for number, file in enumerate(sorted((root / f"images/{split}").rglob("*.png"))):
            file.rename(root / f"images/{split}/{number}-loose.png")
        for folder in "ab":
            (root / f"images/{split}/{folder}").rmdir()


def unlabelled_and_no_probes(content: dict[str, Any], root: Path) -> None:
    without_labels(content, root)
    del content["evaluation"]["linear"], content["evaluation"]["knn"]


def bad_images(count: int) -> Change:
    def change(content: dict[str, Any], root: Path) -> None:
        for number in range(count):
            (root / f"images/train/a/{number}.png").write_bytes(b"no image")

    return change


def both(*changes: Change) -> Change:
    def change(content: dict[str, Any], root: Path) -> None:
        for each in changes:
            each(content, root)

    return change


DATA, TRAINING = "evaluation.detection.things.data", "evaluation.detection.things.training"
CHANGES: dict[str, Change] = {
    "nothing": lambda content, root: None,
    "a batch as large as the set": set_key("pretrain.batch_size", 40),
    "a batch larger than the set": set_key("pretrain.batch_size", 41),
    "a batch larger than what is readable": both(
        set_key("pretrain.batch_size", 40), bad_images(1), set_key("dataset.max_unreadable", 0.5)
    ),
    "a supervised batch of the labelled images": both(supervised, set_key("pretrain.batch_size", 40)),
    "a supervised batch larger than the labelled": both(
        supervised,
        lambda content, root: [image(root / f"images/train/x{n}.png", n) for n in range(9)],
        set_key("pretrain.batch_size", 45),
    ),
    "no val": lambda content, root: shutil.rmtree(root / "images/val"),
    "no val, but a share": both(
        lambda content, root: shutil.rmtree(root / "images/val"), set_key("dataset.val_share", 0.2)
    ),
    "no train": lambda content, root: shutil.rmtree(root / "images/train"),
    "no images": lambda content, root: shutil.rmtree(root / "images"),
    "no labels": without_labels,
    "no labels, supervised": both(supervised, without_labels),
    "no labels, no probes": unlabelled_and_no_probes,
    "one class": lambda content, root: [
        shutil.rmtree(root / f"images/{split}/b") for split in ("train", "val")
    ],
    "val has other classes": lambda content, root: [
        (root / f"images/val/{name}").rename(root / f"images/val/{name}x") for name in "ab"
    ],
    "too many unreadable": bad_images(3),
    "some unreadable": both(bad_images(3), set_key("dataset.max_unreadable", 0.2)),
    "a list that is not there": set_key("dataset.only_listed", ["gone.txt"]),
    "a queue longer than the set": set_key("pretrain.queue_size", 400),
    "a probe's batch larger than train": set_key("evaluation.linear.batch_size", 500),
    "more neighbours than images": set_key("evaluation.knn.k", 500),
    "an evaluation larger than the training": set_key(
        "evaluation", {"image_size": 64, "resize": 64, "knn": {"k": 5, "temperature": 0.1}}
    ),
    "an encoder file that is not there": set_key(
        "methods.other", {"objective": "file", "path": "gone.safetensors"}
    ),
    "an unknown class": set_key(f"{DATA}.classes", ["other"]),
    "a set that is not there": set_key(f"{DATA}.path", "elsewhere"),
    "an image that does not decode": lambda content, root: (
        root / "things/VOC/JPEGImages/3.jpg"
    ).write_bytes(b"no"),
    "an image that is missing": lambda content, root: (root / "things/VOC/JPEGImages/0.jpg").unlink(),
    "an annotation of another size": lambda content, root: annotation(root, 1, width=400),
    "a reversed box": lambda content, root: annotation(root, 2, xmax=1),
    "a reversed box, dropped": both(
        lambda content, root: annotation(root, 2, xmax=1), set_key(f"{DATA}.broken_objects", "drop")
    ),
    "no box at all": lambda content, root: (
        [(root / f"things/VOC/Annotations/{n}.xml").write_text("<annotation></annotation>") for n in (0, 1)]
        and set_key(f"{DATA}.empty_images", "drop")(content, root)
    ),
    "a search on one image": both(
        set_key(f"{TRAINING}.lr", [0.1, 0.2]),
        set_key(f"{TRAINING}.search_iterations", 1),
        set_key(f"{TRAINING}.validation", 0.5),
        lambda content, root: (root / "things/VOC/ImageSets/Main/train.txt").write_text("0\n"),
    ),
    "scenes of photographs that do not exist": set_key(
        "evaluation.detection.things.data",
        {
            **SET["data"],
            "path": "made",
            "classes": ["nothing"],
            "scenes": {"image_size": 96, "num_train": 1, "num_test": 1, "seed": 0},
        },
    ),
}


def refusals(experiment: Experiment) -> Iterator[str]:  # noqa: PLR0912
    """The messages of all stages that refuse the experiment."""
    device = torch.device("cpu")
    try:
        prepare(experiment.dataset, Path("data", experiment.dataset.name), jobs=1)
    except UserError as error:
        yield f"prepare: {error}"
    else:
        dataset = open_dataset(Path("data", experiment.dataset.name))
        for method, seed in all_runs(experiment):
            run = pretrain_run(experiment, method, seed)
            try:
                if isinstance(run.recipe, Training):
                    steps_per_epoch(make_objective(run, dataset).num_images, run.recipe.batch_size)
                elif run.recipe.objective == "file":
                    load_encoder(Path(run.recipe.path), run.encoder, device)
            except (UserError, UserWarning) as error:  # torch warns of a classifier without classes
                yield f"pretrain: {error}"
        for task in probes(experiment):
            probe = probe_run(experiment, *all_runs(experiment)[0], task)
            frozen = Frozen(probe, None, dataset, device, 0, None)  # type: ignore[arg-type]
            for split in ("train", "val"):
                try:
                    frozen.split(split)
                except UserError as error:
                    yield f"{task}: {error}"
    for chosen in experiment.evaluation.detection.values():
        try:
            if chosen.data.scenes:
                _PatchSampler(chosen.data.classes or [], 0, "train")
                continue
            train, test = read_splits(chosen.data, masks=chosen.model.masks)
            check_images([train, test], jobs=1)
            for_training(train, chosen.data.empty_images)
            if len(chosen.training.lr) > 1 and len(train.images) < 2:
                yield "detect: no image to validate on"
        except UserError as error:
            yield f"detect: {error}"


@pytest.mark.parametrize("name", CHANGES)
def test_check_finds_what_the_stages_refuse(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "here"))
    monkeypatch.chdir(root)
    content = yaml.safe_load(TINY.read_text())
    content["dataset"] = {"source": "folder", "name": "mine", "path": "images"}
    content["evaluation"]["detection"] = {"things": copy.deepcopy(SET)}
    CHANGES[name](content, root)
    (root / "mine.yaml").write_text(yaml.safe_dump(content))
    experiment = load_experiment(root / "mine.yaml")
    before = sorted(path for path in root.rglob("*"))
    found = [finding.text for finding in check(experiment) if finding.level == "error"]
    assert sorted(path for path in root.rglob("*")) == before, "checking changes no file"
    assert bool(found) == bool(refused := list(refusals(experiment))), (found, refused)
    prepared = [finding.text for finding in check(experiment) if finding.level == "error"]
    assert bool(prepared) == bool(found), "the same with prepared data"


def test_images_of_train_in_val_are_reported_before_and_after_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path
    monkeypatch.chdir(root)
    for number, name in enumerate(
        ["train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "val/cat/4.png", "val/dog/5.png"]
    ):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(root / "images" / name)
    (root / "images/train/cat/0.png").write_bytes(b"no")  # must not shift the others
    shutil.copy(root / "images/train/cat/2.png", root / "images/val/cat/same.png")
    shutil.copy(root / "images/train/dog/3.png", root / "images/val/cat/contradicts.png")
    content = yaml.safe_load(TINY.read_text())
    content["dataset"] = {"source": "folder", "name": "mine", "path": "images", "max_unreadable": 0.5}
    (root / "mine.yaml").write_text(yaml.safe_dump(content))
    experiment = load_experiment(root / "mine.yaml")

    def warned() -> list[str]:
        return [
            each.text
            for each in check(experiment)
            if "scores on these" in each.text or "two labels" in each.text
        ]

    before = warned()
    prepare(experiment.dataset, Path("data/mine"), jobs=1)
    after = warned()
    for texts in (before, after):
        assert len(texts) == 2
        assert "2 images in more than one split" in texts[0]
        assert "1 image with two labels" in texts[1]


def test_a_percentage_below_one_image_of_each_class_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for number in range(24):
            path = tmp_path / "images" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (10 * number, 0, len(split))).save(path)
    content = yaml.safe_load(TINY.read_text())
    content["dataset"] = {"source": "folder", "name": "mine", "path": "images"}
    content["evaluation"] |= {f"few-{n}": {"task": "few_label", "percent": n} for n in (1, 10)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    (text,) = [
        each.text for each in check(load_experiment(tmp_path / "mine.yaml")) if ".percent" in each.text
    ]
    assert text.startswith("evaluation.few-1.percent: found 1; ")
    assert "2 of 24 are used, 8.33%" in text


def test_all_mistakes_are_reported_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "here"))
    monkeypatch.chdir(root)
    content = yaml.safe_load(TINY.read_text())
    content["dataset"] = {"source": "folder", "name": "mine", "path": "images"}
    content["evaluation"]["detection"] = {"things": copy.deepcopy(SET)}
    both(
        set_key("pretrain.batch_size", 1000), set_key(f"{DATA}.classes", ["other"]),
        lambda content, root: shutil.rmtree(root / "images/val"),
    )(content, root)  # fmt: skip
    (root / "mine.yaml").write_text(yaml.safe_dump(content))
    output = "\n".join(finding.text for finding in check(load_experiment(root / "mine.yaml")))
    for part in (
        "batch_size: found 1000; the set has 40 images",
        "evaluation.linear: found 0 labelled images in val",
        "evaluation.knn: found 0 labelled images in val",
        "unknown class",
    ):
        assert part in output


def gpu_findings(
    monkeypatch: pytest.MonkeyPatch, usable: int, capability: tuple[int, int], kind: str = "GPU"
) -> list[str]:
    """Findings for two visible GPUs, of which torch can use some."""
    monkeypatch.setattr("mochi.preflight.visible", lambda: [f"{kind}-a", f"{kind}-b"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(usable))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
    return [str(finding) for finding in _gpus() if finding.level == "error"]


def test_gpus_that_torch_cannot_use_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = gpu_findings(monkeypatch, 1, (8, 0))
    assert "2 were requested" in text
    assert "driver" in text


def test_a_process_sees_one_of_several_mig_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_findings(monkeypatch, 1, (8, 0), "MIG") == []
    (text,) = gpu_findings(monkeypatch, 0, (8, 0), "MIG")
    assert "1 were requested" in text


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 0), False), ((7, 5), True), ((8, 6), True), ((10, 0), False)]
)
def test_gpus_without_kernels_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    found = gpu_findings(monkeypatch, 2, capability)
    assert len(found) == (0 if runs else 2)
    assert all("7.5, 8.0, 9.0" in text for text in found)
