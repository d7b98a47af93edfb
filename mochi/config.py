"""What an experiment says, checked before anything is computed.

An *experiment* file (`config/*.yaml`) describes one table of results. `resolve` turns
(experiment, method, seed) into a *run*: complete in itself, holding only what that run depends on,
and written as `run.yaml`. Every stage of the pipeline reads the run and nothing else.

Scientific numbers have no defaults here: they stand in the experiment file, each with its source.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from mochi.errors import UserError

RUN_VERSION = 1
EVALUATIONS = ("linear", "knn")
"""Stages that judge frozen features; each has its section in `Evaluation`, beside the detection sets."""


class ConfigError(UserError):
    """A mistake in an experiment or run file."""


def _read_number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as a string; a person means a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Real = Annotated[float, BeforeValidator(_read_number)]
PositiveReal = Annotated[Real, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """Frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# ---------------------------------------------------------------- data


class PhotoPatches(Section):
    """Patches of the photographs that scikit-image and scikit-learn carry (design: embedded data)."""

    source: Literal["photo-patches"]
    name: Name
    patch_size: Count
    """Side of a patch, pixels."""
    train_per_photo: Count
    val_per_photo: Count
    seed: CountOrZero


class Folder(Section):
    """Your own images: `path/{train,val}/<class>/*`, or any tree of unlabelled images."""

    source: Literal["folder"]
    name: Name
    path: str
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.01
    """Largest share of files that may be set aside as unreadable before preparation refuses."""


class Download(Section):
    """What every downloaded data set shares. Contents are checked whatever they come from."""

    name: Name
    archive: str | None = None
    """The official archive, brought by hand: nothing is downloaded."""
    mirrors: list[str] = []
    """Addresses of the archive, tried before the known ones."""


class Cifar(Download):
    """CIFAR (Krizhevsky 2009), binary version; its test images are the split `val`."""

    source: Literal["cifar10", "cifar100"]


class Stl10(Download):
    """STL-10 (Coates et al. 2011): train holds the unlabelled images too; test is the split `val`."""

    source: Literal["stl10"]


class Imagenette(Download):
    """Ten easy classes of ImageNet (fast.ai), version 2."""

    source: Literal["imagenette"]
    size: Literal["full", "320px", "160px"]
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


class ImageNet(Section):
    """ILSVRC 2012 from its official archives or an extracted tree; never downloaded, by its terms."""

    source: Literal["imagenet"]
    name: Name
    path: str
    """Holds ILSVRC2012_img_{train,val}.tar or train/<wnid>/, and val/<wnid>/ or the devkit's labels."""
    subset: Literal["all", "imagenet100"]
    """imagenet100: the 100 classes of CMC's list, which MoCHi cites."""
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


class Voc(Section):
    """PASCAL VOC in place: images are checked and listed, never copied."""

    source: Literal["voc"]
    name: Name
    path: str
    """Holds VOC2007/ and VOC2012/, each with JPEGImages, Annotations and ImageSets/Main."""
    years: Annotated[list[str], Field(min_length=1)]
    """Folders below `path`, for example VOC2007."""
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


class Coco(Section):
    """COCO in place: images are checked and listed, never copied."""

    source: Literal["coco"]
    name: Name
    path: str
    """Holds annotations/instances_<split>.json and <split>/."""
    splits: Annotated[list[Name], Field(min_length=1)]
    """For example train2017, val2017."""
    max_unreadable: Annotated[Real, Field(ge=0, le=1)] = 0.0


Dataset = Annotated[
    PhotoPatches | Folder | Cifar | Stl10 | Imagenette | ImageNet | Voc | Coco,
    Field(discriminator="source"),
]


class Augmentation(Section):
    """Two random views of an image. `v1` and `v2` are MoCo's (facebookresearch/moco main_moco.py)."""

    version: Literal["v1", "v2"]
    image_size: Count
    """Side of a view, pixels."""
    min_scale: Annotated[Real, Field(gt=0, le=1)]
    """Smallest share of the image's area that a random crop may cover."""
    blur: bool = True
    """Version 2 blurs half of the views; at 32 px the blur of 224-px recipes removes the image."""

    @model_validator(mode="after")
    def _v1_has_no_blur(self) -> Self:
        if self.version == "v1" and "blur" in self.model_fields_set and self.blur:
            raise ValueError("blur belongs to version v2; leave it out with v1")
        return self


# ---------------------------------------------------------------- model and training


class Encoder(Section):
    """A ResNet."""

    architecture: Literal["resnet10", "resnet18", "resnet50"]
    """resnet10 has one basic block a stage; the others are torchvision's."""
    stem: Literal["imagenet", "half", "full"]
    """imagenet: 7x7 stride 2 and max-pool; half: 3x3 stride 2; full: 3x3 stride 1 (CIFAR)."""
    width: Count
    """Channels of the first stage (64 in the paper's ResNet-50)."""


class Mixing(Section):
    """Synthetic hard negatives (MoCHi section 3): pool N, s from pairs, s' from the query."""

    num_hardest: Count
    num_pair_synthetics: CountOrZero
    num_query_synthetics: CountOrZero
    warmup_epochs: CountOrZero
    """Epochs at the start without synthesis."""
    through_query: bool = False
    """Let gradients flow into the query inside a query mix. The paper's text leaves it open; every
    public re-implementation detaches, and so do we unless this says otherwise."""

    @model_validator(mode="after")
    def _enough_to_mix(self) -> Self:
        if self.num_pair_synthetics and self.num_hardest < 2:
            raise ValueError(
                f"num_hardest: found {self.num_hardest}; a pair needs at least 2 hardest negatives"
            )
        if not self.num_pair_synthetics and not self.num_query_synthetics:
            raise ValueError(
                "mixing with num_pair_synthetics = num_query_synthetics = 0 is plain MoCo; "
                "leave `mixing` out"
            )
        return self


class Untrained(Section):
    """`random-init`: the floor of every table."""

    objective: Literal["none"]


class Training(Section):
    """What every trained encoder shares."""

    epochs: Count
    batch_size: Count
    lr: PositiveReal
    momentum: Annotated[Real, Field(ge=0, lt=1)]
    weight_decay: Annotated[Real, Field(ge=0)]
    schedule: Literal["cosine", "step"]
    """cosine: per epoch, to zero without a floor. step: times 0.1 at 60% and 80% (MoCo-v1)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the device has it in hardware."""
    checkpoint_minutes: PositiveReal = 5.0
    """A resume checkpoint is written at every epoch's end and at least this often."""


class Supervised(Training):
    """Cross-entropy on the labels: the ceiling of every table."""

    objective: Literal["supervised"]


class Contrastive(Training):
    """MoCo (He et al. 2020) and, with `mixing`, MoCHi."""

    objective: Literal["contrastive"]
    head: Literal["linear", "mlp"]
    """MoCo-v1 has a linear projection head, MoCo-v2 an MLP."""
    embedding_dim: Count
    queue_size: Count
    """K."""
    temperature: PositiveReal
    """tau."""
    key_momentum: Annotated[Real, Field(ge=0, le=1)]
    bn_groups: Count
    """Groups of the global batch whose batch-norm statistics are separate (MoCo: one for each GPU)."""
    mixing: Mixing | None = None
    class_oracle: bool = False
    """Drop negatives of the query's own class, by label: MoCHi's upper bound, not a method."""
    matching_epochs: list[CountOrZero] = []
    """Epochs whose mean matching probabilities of the hardest 1024 are recorded (figure 2)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mixing is not None:
            if self.mixing.num_hardest > self.queue_size:
                raise ValueError(
                    f"mixing.num_hardest: found {self.mixing.num_hardest}; the queue holds only "
                    f"queue_size = {self.queue_size} negatives; lower num_hardest or raise queue_size"
                )
            if self.mixing.warmup_epochs >= self.epochs:
                raise ValueError(
                    f"mixing.warmup_epochs: found {self.mixing.warmup_epochs}; must be smaller than "
                    f"epochs = {self.epochs}, or nothing is ever mixed"
                )
        if self.bn_groups * 2 > self.batch_size:
            raise ValueError(
                f"bn_groups: found {self.bn_groups}; batch_size = {self.batch_size} leaves fewer than "
                f"2 images a group; at most {max(self.batch_size // 2, 1)}"
            )
        late = [epoch for epoch in self.matching_epochs if epoch >= self.epochs]
        if late:
            raise ValueError(f"matching_epochs: found {late}; epochs count from 0 to {self.epochs - 1}")
        return self


Objective = Annotated[Untrained | Supervised | Contrastive, Field(discriminator="objective")]

# ---------------------------------------------------------------- detection


class PhotoScenes(Section):
    """Scenes pasted from the photographs of scikit-image and scikit-learn (design: embedded data)."""

    image_size: Annotated[int, Field(ge=32)]
    """Side of a scene, pixels."""
    num_train: Count
    num_test: Count
    seed: CountOrZero
    """Also decides which cells are for training: as in photo-patches, or test scenes show what an
    encoder was pretrained on."""


class DetectionData(Section):
    """Annotated images: a VOC tree or COCO's JSON files, or scenes made here in either format."""

    format: Literal["voc", "coco"]
    path: str
    """voc: holds `<folder>/{Annotations,JPEGImages,ImageSets/Main}`; coco: holds
    `annotations/instances_<split>.json` and `<split>/`."""
    train: Annotated[list[str], Field(min_length=1)]
    """voc: `<folder>/<image set>`, for example VOC2007/trainval; coco: the split's name."""
    test: Annotated[list[str], Field(min_length=1)]
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    """Names in the order of their labels, from 1. Required by voc; coco takes the file's categories. For
    scenes: the photographs whose pieces are the objects; the others are backgrounds."""
    rule: Literal["11-point", "all-point"] | None = None
    """voc: the average precision that fills AP, AP50 and AP75; the others are reported beside it."""
    broken_objects: Literal["drop", "fail"]
    """What happens to an object without a usable box. Dropped ones are counted and named."""
    empty_images: Literal["keep", "drop"]
    """Training images without a usable box: backgrounds to learn from, or left out (detectron2)."""
    scenes: PhotoScenes | None = None
    """Present: `path` is written by the pipeline itself."""

    @model_validator(mode="after")
    def _voc_says_more(self) -> Self:
        if self.format == "voc" and (self.classes is None or self.rule is None):
            raise ValueError("format voc needs `classes` (in order) and `rule` (11-point or all-point)")
        if self.scenes is not None and self.classes is None:
            raise ValueError("scenes need `classes`: the names of the photographs that are objects")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes: found {self.classes}; names must be distinct")
        return self


class DetectionModel(Section):
    """Faster or Mask R-CNN with a C4 backbone. The feature stride follows from the encoder's stem."""

    masks: bool
    """Mask R-CNN; needs coco annotations with segmentations."""
    anchor_sizes: Annotated[list[PositiveReal], Field(min_length=1)]
    """Square roots of the anchors' areas, pixels of the resized image."""
    anchor_ratios: Annotated[list[PositiveReal], Field(min_length=1)]
    """Height over width."""
    rpn_batch: Count
    """Anchors sampled an image for the proposal loss, half of them positive at most."""
    proposals_train: Annotated[list[Count], Field(min_length=2, max_length=2)]
    """Proposals kept before and after non-maximum suppression, in training."""
    proposals_test: Annotated[list[Count], Field(min_length=2, max_length=2)]
    roi_size: Annotated[int, Field(ge=2)]
    """Side of the pooled region, cells."""
    roi_batch: Count
    """Regions sampled an image for the head's loss."""
    roi_positive: Annotated[Real, Field(gt=0, le=1)]
    """Largest share of positives among them."""
    score_threshold: Annotated[Real, Field(ge=0, lt=1)]
    max_detections: Count
    """Detections kept an image."""


class DetectionTraining(Section):
    """Fine-tuning. `lr`, `iterations` and `warmup_iterations` are said for `lr_batch_size` images a step
    and scaled to `batch_size`, so that the rate per image and the images seen stay the same."""

    reading: Literal["finetune", "frozen"]
    """finetune: everything is trained (the paper's). frozen: conv1 to res4 keep their weights; only their
    batch-norm statistics are taken anew on the set, for every encoder alike."""
    seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    """Fine-tunings of one encoder; the table gives their mean and spread."""
    lr: Annotated[list[PositiveReal], Field(min_length=1)]
    """One rate, or candidates: each is tried once on a part of train and the best on the rest of train
    is used. Test images take no part in the choice."""
    choose_iterations: Count | None = None
    """Length of such a try; required with several candidates."""
    validation: Annotated[Real, Field(gt=0, lt=1)] | None = None
    """Share of train that judges the candidates; required with several candidates."""
    lr_batch_size: Count
    batch_size: Count
    """Images a step, over all processes and accumulations."""
    micro_batch: Count
    """Images a process holds at once; gradients accumulate up to `batch_size`."""
    iterations: Count
    warmup_iterations: CountOrZero
    """Linear from a thousandth of the rate (detectron2)."""
    schedule: Literal["step", "cosine"]
    lr_drops: list[Count] = []
    """step: iterations at which the rate is divided by 10."""
    momentum: Annotated[Real, Field(ge=0, lt=1)]
    weight_decay: Annotated[Real, Field(ge=0)]
    train_sizes: Annotated[list[Count], Field(min_length=1)]
    """Short sides in pixels, one drawn for each image."""
    test_size: Count
    max_size: Count
    """Longest side, pixels."""
    flip: bool
    """Half of the training images are mirrored."""
    precise_bn_batches: CountOrZero
    """Batches over which batch-norm statistics are averaged again before evaluation, and, of a frozen
    backbone, before training; 0: none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: CountOrZero = 0
    """Processes that read images; 0 reads them in the training process."""
    checkpoint_minutes: PositiveReal = 10.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct_seeds(self.seeds)
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch: found {self.micro_batch}; it must divide batch_size = {self.batch_size}"
            )
        if len(self.lr) > 1 and (self.choose_iterations is None or self.validation is None):
            raise ValueError("several lr candidates need `choose_iterations` and `validation`")
        late = [drop for drop in self.lr_drops if drop >= self.iterations]
        if late:
            raise ValueError(f"lr_drops: found {late}; training has {self.iterations} iterations only")
        if self.schedule == "cosine" and self.lr_drops:
            raise ValueError("lr_drops belong to schedule step; leave them out with cosine")
        return self


class DetectionSet(Section):
    """One detection column of the table: what is detected, by which model, trained how."""

    data: DetectionData
    model: DetectionModel
    training: DetectionTraining
    methods: list[Name] | None = None
    """Rows it is computed for; absent: all."""
    pretrain_seeds: list[CountOrZero] | None = None
    """Pretraining seeds it is computed for; absent: all."""

    @model_validator(mode="after")
    def _masks_are_annotated(self) -> Self:
        if self.model.masks and self.data.format == "voc":
            raise ValueError("model.masks: found true with format voc, which has boxes only; use coco")
        return self


# ---------------------------------------------------------------- evaluation


class LinearProbe(Section):
    """Linear classification on the frozen encoder."""

    protocol: Name
    """Name of the protocol, printed in every table."""
    epochs: Count
    batch_size: Count
    lr: PositiveReal
    lr_candidates: list[PositiveReal] = []
    """Trained beside `lr` on the same features; the best on a held-out part of train is reported
    beside the protocol's own, never instead of it."""
    momentum: Annotated[Real, Field(ge=0, lt=1)]
    weight_decay: Annotated[Real, Field(ge=0)]
    lr_drops: list[Count]
    """Epochs at whose start the learning rate is multiplied by lr_drop_factor."""
    lr_drop_factor: Annotated[Real, Field(gt=0, lt=1)]
    min_scale: Annotated[Real, Field(gt=0, le=1)] | None
    """Random-resized-crop training of the probe; null: one pass over uncropped images, cached."""
    held_out: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """Share of train on which the candidates are compared."""
    standardize: bool = False
    """Scale each feature to unit variance on train, so that one lr fits every encoder."""

    @model_validator(mode="after")
    def _drops_in_range(self) -> Self:
        late = [epoch for epoch in self.lr_drops if epoch >= self.epochs]
        if late:
            raise ValueError(f"lr_drops: found {late}; the probe trains for {self.epochs} epochs only")
        return self


class NearestNeighbours(Section):
    """Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978)."""

    k: Count
    temperature: PositiveReal


class Evaluation(Section):
    """How frozen encoders are judged."""

    image_size: Count
    """Side of the centre crop, pixels."""
    resize: Count
    """Short side before the centre crop, pixels."""
    batch_size: Count = 256
    linear: LinearProbe | None = None
    knn: NearestNeighbours | None = None
    detection: dict[Name, DetectionSet] = {}
    """Detection sets by name; a set's results stand in `detection-<name>`."""

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.resize < self.image_size:
            raise ValueError(
                f"resize: found {self.resize}; must be at least image_size = {self.image_size}"
            )
        return self


# ---------------------------------------------------------------- experiment and run


class Experiment(Section):
    """One table of results."""

    name: Name
    title: str
    dataset: Dataset
    seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    encoder: Encoder
    augmentation: Augmentation
    pretrain: dict[str, Any]
    """The shared recipe: fields of `Contrastive`. A method overrides them key by key."""
    methods: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Row name -> what differs. Beside recipe keys: `seeds`, `augmentation`."""
    evaluation: Evaluation

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        return _distinct_seeds(seeds)


class Run(Section):
    """(experiment, method, seed), resolved: whole, or `only_for` one stage and empty elsewhere."""

    version: int
    experiment: Name
    method: Name
    seed: CountOrZero
    dataset: Name
    encoder: Encoder
    augmentation: Augmentation | None
    pretrain: Objective | None
    evaluation: Evaluation | None


def _distinct_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"found {seeds}; seeds must be distinct, or a spread over them means nothing")
    return seeds


_METHOD_ONLY = {"seeds", "augmentation"}
_MOCHI_NAME = re.compile(r"^mochi-(\d+)-(\d+)-(\d+)(?:-.*)?$")


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment file, every method resolved once.

    Raises:
        ConfigError: with one line for each mistake: file, key path, what was found, what is allowed.
    """
    return parse_experiment(_read_yaml(path), str(path))


def parse_experiment(data: Mapping[str, Any], origin: str) -> Experiment:
    """Check a mapping that came from `origin`; see `load_experiment`."""
    experiment: Experiment = _validate(TypeAdapter(Experiment), data, origin)
    for method in experiment.methods:
        for seed in method_seeds(experiment, method, origin):
            resolve(experiment, method, seed, origin)
    for name, chosen in experiment.evaluation.detection.items():
        where = f"{origin}: evaluation.detection.{name}"
        for method in chosen.methods or []:
            if method not in experiment.methods:
                raise ConfigError(f"{where}.methods: {_did_you_mean(method, list(experiment.methods))}")
        if not detection_runs(experiment, name):
            raise ConfigError(f"{where}.pretrain_seeds: found {chosen.pretrain_seeds}; no method has them")
    return experiment


def parse_dataset(source: str, name: str, path: str | None, options: list[str]) -> Dataset:
    """A data set from the command line instead of an experiment file.

    Args:
        source: its origin.
        name: of the folder it is prepared in.
        path: where the images lie, for sources that read them from somewhere.
        options: more keys of the source, each as `key=value`.

    Raises:
        ConfigError: unknown source or key, or a value that is not allowed.
    """
    data: dict[str, Any] = {"source": source, "name": name} | ({"path": path} if path else {})
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--option: found {option!r}; expected key=value")
        data[key] = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    dataset: Dataset = _validate(TypeAdapter(Dataset), data, "--source")
    return dataset


def method_seeds(experiment: Experiment, method: str, origin: str = "experiment") -> list[int]:
    """The method's own seeds, or the experiment's."""
    seeds = experiment.methods[method].get("seeds", experiment.seeds)
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(
            f"{origin}: methods.{method}.seeds: found {seeds!r}; allowed: a list of integers >= 0"
        )
    try:
        return _distinct_seeds(seeds)
    except ValueError as error:
        raise ConfigError(f"{origin}: methods.{method}.seeds: {error}") from None


def detection_runs(experiment: Experiment, name: str) -> list[tuple[str, int]]:
    """(method, seed) of the runs that a detection set is computed for, in the order of the file."""
    chosen = experiment.evaluation.detection[name]
    return [
        (method, seed)
        for method in experiment.methods
        for seed in method_seeds(experiment, method)
        if chosen.methods is None or method in chosen.methods
        if chosen.pretrain_seeds is None or seed in chosen.pretrain_seeds
    ]


def resolve(experiment: Experiment, method: str, seed: int, origin: str = "experiment") -> Run:
    """The run of one method and seed: shared recipe and method merged, foreign keys left behind."""
    if method not in experiment.methods:
        raise ConfigError(f"{origin}: methods: {_did_you_mean(method, list(experiment.methods))}")
    own = {key: value for key, value in experiment.methods[method].items() if key not in _METHOD_ONLY}
    objective = own.get("objective", "contrastive")
    models: dict[str, type[Section]] = {"none": Untrained, "supervised": Supervised}
    model = models.get(str(objective), Contrastive)
    known = set(Contrastive.model_fields)
    for place, keys in (("pretrain", experiment.pretrain), (f"methods.{method}", own)):
        for key in keys:
            if key not in known:
                allowed = sorted(known | (_METHOD_ONLY if place != "pretrain" else set()))
                raise ConfigError(f"{origin}: {place}.{key}: {_did_you_mean(key, allowed)}")
    merged = {**experiment.pretrain, **own, "objective": objective}
    recipe = {key: value for key, value in merged.items() if key in model.model_fields or key in own}
    augmentation = {
        **experiment.augmentation.model_dump(exclude_unset=True),
        **experiment.methods[method].get("augmentation", {}),
    }
    run: Run = _validate(
        TypeAdapter(Run),
        {
            "version": RUN_VERSION,
            "experiment": experiment.name,
            "method": method,
            "seed": seed,
            "dataset": experiment.dataset.name,
            "encoder": experiment.encoder.model_dump(),
            "augmentation": augmentation,
            "pretrain": recipe,
            "evaluation": experiment.evaluation.model_dump(),
        },
        origin,
        rename={"pretrain": f"methods.{method}", "augmentation": f"methods.{method}.augmentation"},
    )
    _check_name(run, origin)
    return run


def _check_name(run: Run, origin: str) -> None:
    """A row called mochi-N-s-s' must be what it says."""
    match = _MOCHI_NAME.match(run.method)
    if run.method.startswith("mochi") and not match:
        raise ConfigError(
            f"{origin}: methods.{run.method}: found that name; a MoCHi row is called "
            "mochi-N-s-s', for example mochi-1024-512-256"
        )
    if not match:
        return
    promised = tuple(int(number) for number in match.groups())
    mixing = run.pretrain.mixing if isinstance(run.pretrain, Contrastive) else None
    carried = mixing and (
        mixing.num_hardest,
        mixing.num_pair_synthetics,
        mixing.num_query_synthetics,
    )
    if carried != promised:
        raise ConfigError(
            f"{origin}: methods.{run.method}.mixing: found (N, s, s') = {carried}; the row's name "
            f"promises {promised}; make them agree"
        )


def write_run(run: Run) -> str:
    """The text of run.yaml."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_run(path: Path, stage: str) -> Run:
    """Read a run.yaml for a stage.

    Raises:
        ConfigError: not readable, from another version, no run, or without what the stage needs.
    """
    data = _read_yaml(path)
    version = data.get("version")
    if version != RUN_VERSION:
        raise ConfigError(
            f"{path}: version: found {version!r}; this program reads run files of version "
            f"{RUN_VERSION}; write it again with `python -m mochi resolve`"
        )
    run: Run = _validate(TypeAdapter(Run), data, str(path))
    needed: Section | None
    if stage.startswith("detection-") and run.evaluation:
        needed = run.evaluation.detection.get(stage.removeprefix("detection-"))
    else:
        needed = run.pretrain if stage == "pretrain" else getattr(run.evaluation, stage, None)
    if needed is None:
        raise ConfigError(
            f"{path}: says nothing about the stage {stage}; expected a run resolved for it: write it again "
            f"with `python -m mochi resolve --stage {stage}`, or add {stage} to the experiment"
        )
    return run


def only_for(run: Run, stage: str) -> Run:
    """The part of a run that the results of a stage depend on; the rest is empty.

    Pretraining ignores the evaluation. An evaluation ignores the others and the recipe, whose effect
    reaches it through the encoder's bytes. So editing one thing re-runs what depends on it and no more.
    """
    if stage == "pretrain":
        return run.model_copy(update={"evaluation": None})
    evaluation = run.evaluation
    assert evaluation is not None
    detection = {
        name: chosen for name, chosen in evaluation.detection.items() if stage == f"detection-{name}"
    }
    others = {name: None for name in EVALUATIONS if name != stage}
    kept = evaluation.model_copy(update={**others, "detection": detection})
    return run.model_copy(update={"augmentation": None, "pretrain": None, "evaluation": kept})


def settings(run: Run, stage: str) -> dict[str, Any]:
    """What `only_for` keeps, as JSON, without names and without what changes no result."""
    kept = only_for(run, stage).model_dump(mode="json", exclude={"version", "experiment", "method"})
    if kept["pretrain"]:
        kept["pretrain"].pop("checkpoint_minutes", None)
    if stage.startswith("detection-"):
        (chosen,) = kept["evaluation"]["detection"].values()
        for label in ("methods", "pretrain_seeds"):
            chosen.pop(label)
        for label in ("workers", "checkpoint_minutes"):
            chosen["training"].pop(label)
        return {"seed": kept["seed"], "encoder": kept["encoder"], "detection": chosen}
    return kept


def digest(value: object) -> str:
    """Short sha256 of a JSON-like value, for params and provenance."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- reading and messages


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {type(data).__name__}; expected keys and values")
    return data


def _validate(
    adapter: TypeAdapter[Any],
    data: Mapping[str, Any],
    origin: str,
    rename: Mapping[str, str] | None = None,
) -> Any:
    """Check `data`, or raise a line for each mistake; `rename` says where a top-level key came from."""
    try:
        return adapter.validate_python(dict(data))
    except ValidationError as error:
        lines = []
        for mistake in error.errors():
            keys, body = _explain(dict(mistake))
            where = ".".join([(rename or {}).get(keys[0], keys[0]), *keys[1:]]) if keys else "(top level)"
            lines.append(f"{origin}: {where}: {body}")
        raise ConfigError("\n".join(lines)) from None


def _explain(mistake: dict[str, Any]) -> tuple[list[str], str]:
    """The key path of a mistake, and what was found and what is allowed there."""
    keys, siblings = _place(mistake["loc"])
    found, text = mistake["input"], mistake["msg"].removeprefix("Value error, ")
    match mistake["type"]:
        case "extra_forbidden":
            return keys, _did_you_mean(keys[-1], siblings)
        case "missing" | "union_tag_not_found":
            if mistake["type"] == "union_tag_not_found":
                keys = [*keys, mistake["ctx"]["discriminator"].strip("'")]
            return keys, "missing; this key is required"
        case "union_tag_invalid":
            context = mistake["ctx"]
            allowed = re.findall(r"'([^']+)'", context["expected_tags"])
            return [*keys, context["discriminator"].strip("'")], _guess(context["tag"], allowed)
        case "value_error":
            # Cross-field rules name the key and the values themselves.
            return keys, text
        case _:
            shown = repr(found) if len(repr(found)) < 80 else type(found).__name__
            return keys, f"found {shown}; allowed: {text.removeprefix('Input should be ')}"


def _place(location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The keys of a location without the names of union members, and the keys allowed beside it."""
    keys: list[str] = []
    models: list[type[Section]] = [Experiment, Run, *_sections(Dataset)]
    beside = models
    for part in map(str, location):
        inside = [
            section
            for model in models
            if part in model.model_fields
            for section in _sections(model.model_fields[part].annotation)
        ]
        chosen = [model for model in models if part in _tags(model)]
        if chosen and not inside:
            models = chosen
            continue
        keys.append(part)
        known = any(part in model.model_fields for model in models)
        # What is no field is a name of the user's own, such as a detection set's, or the mistake itself.
        beside, models = models, inside if known else models
    return keys, sorted({name for model in beside for name in model.model_fields})


def _sections(annotation: object) -> list[type[Section]]:
    """The sections that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _tags(model: type[Section]) -> set[str]:
    """The names by which a section is chosen from a union: its only allowed source or objective."""
    fields = (model.model_fields.get(name) for name in ("source", "objective"))
    return {tag for field in fields if field for tag in get_args(field.annotation)}


def _did_you_mean(key: str, allowed: list[str]) -> str:
    return f"unknown key {_guess(key, allowed).removeprefix('found ')}"


def _guess(found: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(found, allowed, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"found {found!r}; {guess}allowed: {', '.join(sorted(allowed))}"
