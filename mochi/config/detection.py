"""Detection sets: data, model and training."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mochi.config.sections import Count, CountOrZero, Name, PositiveReal, Real, Section, distinct_seeds


class PhotoScenes(Section):
    """Scenes pasted from the photographs of scikit-image and scikit-learn (embedded data)."""

    image_size: Annotated[int, Field(ge=32)]
    """Side of a scene, pixels."""
    num_train: Count
    """Scenes to train on."""
    num_test: Count
    """Scenes to test on."""
    seed: CountOrZero
    """Seed of the scenes and of the cells used for train. Use the seed of photo-patches; otherwise test
    scenes show pretraining data."""


class DetectionData(Section):
    """Annotated images: a VOC tree or COCO's JSON files, or scenes generated here in either format."""

    format: Literal["voc", "coco"]
    """voc: one XML file for each image. coco: one JSON file for each split."""
    path: str
    """voc: contains `<folder>/{Annotations,JPEGImages,ImageSets/Main}`; coco: contains
    `annotations/instances_<split>.json` and `<split>/`."""
    train: Annotated[list[str], Field(min_length=1)]
    """voc: `<folder>/<image set>`, for example VOC2007/trainval; coco: the split's name."""
    test: Annotated[list[str], Field(min_length=1)]
    """Image sets or splits to test on, named as in `train`."""
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    """Names in the order of their labels, from 1. Required by voc; coco takes the file's categories. For
    scenes: the photographs whose pieces are the objects; the others are backgrounds."""
    interpolation: Literal["11-point", "all-point"] | None = None
    """voc: interpolation of the precision-recall curve, for AP, AP50 and AP75: `11-point` (2007) or
    `all-point` (2010 and later). The other one and COCO's are reported too."""
    broken_objects: Literal["drop", "fail"]
    """An object without a usable box (none, not four numbers, reversed, without area, outside the image)
    or, with masks, without a usable segmentation: drop it (counted and named), or fail."""
    empty_images: Literal["keep", "drop"]
    """Training images without a usable box: keep them as backgrounds, or drop them (detectron2)."""
    scenes: PhotoScenes | None = None
    """If given, the pipeline generates scenes and writes them to `path`."""

    def annotation_files(self) -> list[str]:
        """Files that show that the set exists: scenes.json of made scenes, else the lists of images."""
        if self.scenes:
            return [f"{self.path}/scenes.json"]
        splits = [*self.train, *self.test]
        if self.format == "coco":
            return [f"{self.path}/annotations/instances_{split}.json" for split in splits]
        halves = [split.rpartition("/") for split in splits]
        return [f"{self.path}/{folder}/ImageSets/Main/{name}.txt" for folder, _, name in halves]

    @model_validator(mode="after")
    def _voc_says_more(self) -> Self:
        if self.format == "voc" and (self.classes is None or self.interpolation is None):
            raise ValueError(
                "format voc needs `classes` (in order) and `interpolation` (11-point or all-point)"
            )
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
    """Anchors sampled per image for the proposal loss, at most half of them positive."""
    proposals_train: Annotated[list[Count], Field(min_length=2, max_length=2)]
    """Proposals kept before and after non-maximum suppression, in training."""
    proposals_test: Annotated[list[Count], Field(min_length=2, max_length=2)]
    """Proposals kept before and after non-maximum suppression, in tests."""
    roi_size: Annotated[int, Field(ge=2)]
    """Side of the pooled region, cells."""
    roi_batch: Count
    """Regions sampled per image for the head's loss."""
    roi_positive: Annotated[Real, Field(gt=0, le=1)]
    """Largest fraction of positives among them."""
    score_threshold: Annotated[Real, Field(ge=0, lt=1)]
    """Detections with a lower score are dropped."""
    max_detections: Count
    """Detections kept per image."""


class DetectionTraining(Section):
    """Fine-tuning. `lr`, `iterations` and `warmup_iterations` are given for `lr_batch_size` images per step
    and scaled to `batch_size`, so that the rate per image and the images seen stay the same."""

    mode: Literal["finetune", "frozen"]
    """finetune: everything is trained (the paper). frozen: conv1 to res4 keep their weights; only their
    batch-norm statistics are recomputed on the set, for every encoder."""
    seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    """Fine-tunings of one encoder; the table gives their mean and standard deviation."""
    together: bool = False
    """True: one job does all fine-tunings of an encoder and the search before them, which saves time if
    each is short. False: each is a separate job with separate results."""
    lr: Annotated[list[PositiveReal], Field(min_length=1)]
    """One rate, or candidates: each is trained once on a part of train and evaluated on the rest of train,
    and the best is used. Test images take no part in the search."""
    search_iterations: Count | None = None
    """Iterations of a candidate; required with several candidates."""
    validation: Annotated[Real, Field(gt=0, lt=1)] | None = None
    """Fraction of train to evaluate the candidates on; required with several candidates."""
    lr_batch_size: Count
    """Images per step for which `lr`, `iterations` and `warmup_iterations` are given."""
    batch_size: Count
    """Images per step, over all processes and accumulation steps."""
    micro_batch: Count
    """Images per process at a time; gradients accumulate up to `batch_size`."""
    iterations: Count
    """Steps of a fine-tuning."""
    warmup_iterations: CountOrZero
    """Linear from a thousandth of the rate (detectron2)."""
    schedule: Literal["step", "cosine"]
    """step: the rate is divided by 10 at each of `lr_drops`. cosine: it falls to zero."""
    lr_drops: list[Count] = []
    """step: iterations at which the rate is divided by 10."""
    momentum: Annotated[Real, Field(ge=0, lt=1)]
    """Momentum of SGD."""
    weight_decay: Annotated[Real, Field(ge=0)]
    """Weight of the L2 penalty; batch normalisation has none."""
    train_sizes: Annotated[list[Count], Field(min_length=1)]
    """Short sides in pixels, one chosen at random for each image."""
    test_size: Count
    """Short side in tests, pixels."""
    max_size: Count
    """Longest side, pixels."""
    flip: bool
    """Half of the training images are mirrored."""
    precise_bn_batches: CountOrZero
    """Batches over which batch-norm statistics are averaged again before evaluation, and, of a frozen
    backbone, before training; 0: none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 if the device supports it in hardware."""
    workers: CountOrZero = 0
    """Processes that read images, unless `--workers` is given, as the workflow does; 0: the training
    process reads them."""
    checkpoint_minutes: PositiveReal = 10.0
    """Minutes between resume checkpoints."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        distinct_seeds(self.seeds)
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch: found {self.micro_batch}; it must divide batch_size = {self.batch_size}"
            )
        if len(self.lr) > 1 and (self.search_iterations is None or self.validation is None):
            raise ValueError("several lr candidates need `search_iterations` and `validation`")
        late = [drop for drop in self.lr_drops if drop >= self.iterations]
        if late:
            raise ValueError(f"lr_drops: found {late}; training has only {self.iterations} iterations")
        if self.schedule == "cosine" and self.lr_drops:
            raise ValueError("lr_drops belong to schedule step; leave them out with cosine")
        return self


class DetectionSet(Section):
    """One detection column of the table: data, model and training."""

    data: DetectionData
    """The annotated images."""
    model: DetectionModel
    """The detector."""
    training: DetectionTraining
    """How it is fine-tuned."""
    methods: list[Name] | None = None
    """Rows that it is computed for; default: all."""
    pretrain_seeds: list[CountOrZero] | None = None
    """Pretraining seeds that it is computed for; default: all."""

    @model_validator(mode="after")
    def _masks_are_annotated(self) -> Self:
        if self.model.masks and self.data.format == "voc":
            raise ValueError("model.masks: found true with format voc, which has boxes only; use coco")
        return self
