"""Annotations in memory: what is refused, counted, merged and split."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mochi.detection.annotations import (
    AnnotatedImage,
    AnnotationError,
    Annotations,
    Mistakes,
    clip,
    count_cut,
    for_training,
    merge,
    render_counts,
    require_same_classes,
    split_off,
)

CLASSES = ("square", "bar")


def image(
    name: str = "one",
    labels: tuple[int, ...] = (1,),
    box: tuple[float, ...] = (1, 2, 3, 5),
    trained: tuple[bool, ...] | None = None,
) -> AnnotatedImage:
    count = len(labels)
    kept = np.ones(count, bool) if trained is None else np.array(trained, bool)
    return AnnotatedImage(
        name, Path(f"{name}.jpg"), 20, 30,
        np.tile(np.array(box, np.float32), (count, 1)), np.array(labels, np.int64),
        ~kept, kept, tuple({"size": [20, 30], "counts": number} for number in range(count)),
        10 * np.arange(count, dtype=np.float64),
    )  # fmt: skip


@pytest.mark.parametrize("label", [-1, 0, 3, 9])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    Annotations(CLASSES, (image(labels=(1, 2)),))
    with pytest.raises(AnnotationError, match=rf"one\.jpg: found label {label}; labels of 2 classes run "):
        Annotations(CLASSES, (image(labels=(1, label)),))


@pytest.mark.parametrize(
    "box", [(1, 2, 1, 5), (1, 2, 3, 2), (3, 2, 1, 5), (1, 5, 3, 2), (np.nan, 2, 3, 5), (1, 2, np.inf, 5)]
)
def test_boxes_without_an_area_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(AnnotationError, match=r"one\.jpg: found a box without an area or not finite"):
        Annotations(CLASSES, (image(box=box),))


def test_boxes_are_clipped_on_each_side() -> None:
    inside = clip(np.array([[-1.5, -2, 31, 22], [1.5, 2, 29, 19.5]]), 20, 30)
    assert inside.dtype == np.float32
    assert inside.tolist() == [[0, 0, 30, 20], [1.5, 2, 29, 19.5]]


def test_boxes_that_clipping_changes_are_counted_and_rounding_is_not() -> None:
    counts = Counter[str]()
    whole = [[0, 0, 30, 20], [-1e-9, 0, 30 + 1e-13, 20]]
    beyond = [[-1, 0, 30, 20], [0, -1, 30, 20], [0, 0, 30.0002, 20], [0, 0, 30, 1e300], [-1, -1, 31, 21]]
    count_cut(np.array(whole), 20, 30, counts)
    assert counts["boxes cut to the image"] == 0
    count_cut(np.array(whole + beyond), 20, 30, counts)
    assert counts["boxes cut to the image"] == 5


@pytest.mark.parametrize(("count", "end"), [(5, []), (6, ["... and 1 more mistakes like these"])])
def test_the_first_five_mistakes_are_shown(count: int, end: list[str]) -> None:
    mistakes = Mistakes()
    mistakes.refuse()
    for number in range(count):
        with mistakes.collected():
            raise AnnotationError(f"mistake {number}")
    with pytest.raises(AnnotationError) as error:
        mistakes.refuse()
    assert str(error.value).splitlines() == [*(f"mistake {n}" for n in range(5)), *end]


def test_counts_of_zero_are_left_out() -> None:
    assert render_counts(Counter({"crowds": 2, "boxes cut": 1, "names": 0})) == "boxes cut: 1, crowds: 2"
    assert render_counts(Counter({"names": 0})) == "nothing counted"


def test_the_report_counts_objects_of_each_class() -> None:
    empty = {"images": 0, "objects": 0, "classes": {"square": 0, "bar": 0}}
    assert Annotations(CLASSES, ()).report() == empty
    images = (image(labels=(2, 2, 1)), image("two", labels=(2,)))
    report = Annotations(CLASSES, images, Counter({"b": 0, "a": 3}), "from 1").report()
    assert report == {
        "images": 2,
        "objects": 4,
        "classes": {"square": 1, "bar": 3},
        "numbering": "from 1",
        "a": 3,
        "b": 0,
    }
    assert list(report)[-2:] == ["a", "b"]


def test_parts_are_merged_in_order() -> None:
    first = Annotations(CLASSES, (image("one"),), Counter(a=1, b=2), "from 1", ("x",))
    second = Annotations(CLASSES, (image("two"), image("three")), Counter(a=4), "from 0", ("y", "z"))
    merged = merge([first, second])
    assert [each.image_id for each in merged.images] == ["one", "two", "three"]
    assert merged.counts == Counter(a=5, b=2)
    assert (merged.classes, merged.numbering, merged.dropped) == (CLASSES, "from 1", ("x", "y", "z"))
    with pytest.raises(AnnotationError, match="number 1 is 'square' in the first and 'bar' in the second"):
        merge([first, Annotations(CLASSES[::-1], ())])


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (("square",), "different classes: only in the first: bar; give"),
        (("square", "bar", "dot", "arc"), "different classes: only in the second: arc, dot; give"),
        (("square", "dot"), "different classes: only in the first: bar; only in the second: dot; give"),
        (("bar", "square"), "different classes: number 1 is 'square' in the first and 'bar' in the second"),
    ],
)
def test_different_classes_are_named(second: tuple[str, ...], text: str) -> None:
    require_same_classes(CLASSES, CLASSES)
    with pytest.raises(AnnotationError, match=text):
        require_same_classes(CLASSES, second)


def test_training_keeps_each_trained_object_with_its_values() -> None:
    annotations = Annotations(
        CLASSES,
        (image(labels=(1, 2, 2), trained=(False, True, True)), image("two", (1,), trained=(False,))),
    )
    for empty_images, names in (("keep", ["one", "two"]), ("drop", ["one"])):
        kept = for_training(annotations, empty_images)
        assert [each.image_id for each in kept.images] == names
        assert kept.counts == Counter({"images without a trained box": 1})
        first = kept.images[0]
        assert first.labels.tolist() == [2, 2]
        assert (first.ignored.tolist(), first.trained.tolist()) == ([False, False], [True, True])
        assert first.masks is not None
        assert [mask["counts"] for mask in first.masks] == [1, 2]
        assert first.areas is not None
        assert first.areas.tolist() == [10, 20]


@pytest.mark.parametrize(
    ("count", "share", "size"), [(10, 0.2, 2), (10, 0.26, 3), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1)]
)
def test_a_share_of_the_images_is_split_off(count: int, share: float, size: int) -> None:
    annotations = Annotations(CLASSES, tuple(image(f"{number}") for number in range(count)))
    rest, part = (
        [str(each.image_id) for each in half.images]
        for half in split_off(annotations, share, np.random.default_rng(0))
    )
    assert (len(rest), len(part)) == (count - size, size)
    assert sorted(rest + part) == sorted(f"{number}" for number in range(count))
    assert (rest, part) == (sorted(rest, key=int), sorted(part, key=int)), "in the order of the set"


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_not_split(count: int) -> None:
    annotations = Annotations(CLASSES, (image(),) * count)
    with pytest.raises(AnnotationError, match=rf"found {count} training image\(s\); .* at least 2"):
        split_off(annotations, 0.5, np.random.default_rng(0))
