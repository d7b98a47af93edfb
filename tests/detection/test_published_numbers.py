"""The numbers of detectron2's C4 configuration, each tested by its effect: with another number a test
fails.

Source of the numbers: detectron2 config/defaults.py and moco detection/configs/Base-RCNN-C4-BN.yaml.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from mochi.detection.model import Detector, build
from tests.detection.sets import ENCODER, small_model
from tests.detection.test_masks import bilinear

SIDE = 1000.0
"""Side of a square object; other boxes overlap it by known amounts."""


def detector(**changes: object) -> Detector:
    torch.manual_seed(0)
    return build(ENCODER, 3, small_model(**changes))


def overlapping(*overlaps: float) -> Tensor:
    """Boxes inside (0, 0, SIDE, SIDE) that have the given IoU with it."""
    return torch.tensor([[0.0, 0.0, SIDE, SIDE * overlap] for overlap in overlaps])


OBJECT = overlapping(1.0)


def test_anchors_are_positive_from_iou_07_and_negative_below_03() -> None:
    anchors = overlapping(1.0, 0.71, 0.69, 0.5, 0.31, 0.29, 0.0)
    labels, _ = detector().proposals.assign_targets_to_anchors([anchors], [{"boxes": OBJECT}])
    assert labels[0].tolist() == [1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 0.0]


def test_the_best_anchor_of_an_object_is_positive_at_any_iou() -> None:
    labels, _ = detector().proposals.assign_targets_to_anchors([overlapping(0.2, 0.1)], [{"boxes": OBJECT}])
    assert labels[0].tolist() == [1.0, 0.0]


def test_half_of_the_sampled_anchors_are_positive_at_most() -> None:
    sampler = detector(rpn_batch=40).proposals.fg_bg_sampler
    many = torch.tensor([1.0] * 40 + [0.0] * 40 + [-1.0] * 5)
    few = torch.tensor([1.0] * 3 + [0.0] * 40)
    positive, negative = sampler([many, few])
    assert [int(chosen.sum()) for chosen in (*positive, *negative)] == [20, 3, 20, 37]


@pytest.mark.parametrize(("mode", "before", "after"), [(True, 6, 3), (False, 5, 2)], ids=["train", "test"])
def test_proposals_before_and_after_suppression_at_07(mode: bool, before: int, after: int) -> None:
    """Of two boxes with IoU 0.69 both stay, with 0.71 only the better one; training and test have
    different numbers.
    """
    model = detector(proposals_train=[6, 3], proposals_test=[5, 2]).train(mode).proposals

    def kept(boxes: Tensor) -> Tensor:
        scores = torch.linspace(3, -3, len(boxes))[None, :, None]
        found, _ = model.filter_proposals(boxes[None], scores, [(4000, 4000)], [len(boxes)])
        result: Tensor = found[0]
        return result

    assert len(kept(overlapping(1.0, 0.69))) == 2
    assert len(kept(overlapping(1.0, 0.71))) == 1
    apart = torch.tensor([[200.0 * i, 0, 200.0 * i + 100, 100] for i in range(12)])
    assert kept(apart).tolist() == apart[:after].tolist()
    # Only the best `before` are used: copies of one box, and another box that is ranked too low.
    copies = torch.cat([OBJECT.expand(before, 4), OBJECT + 2000])
    assert len(kept(copies)) == 1
    assert len(kept(copies[1:])) == 2


def test_regions_are_positive_from_iou_05() -> None:
    heads = detector().heads
    _, labels = heads.assign_targets_to_proposals(
        [overlapping(1.0, 0.51, 0.49, 0.0)], [OBJECT], [torch.tensor([2])]
    )
    assert labels[0].tolist() == [2, 2, 0, 0]


def test_a_quarter_of_the_sampled_regions_are_positive_at_most() -> None:
    heads = detector(roi_batch=16, roi_positive=0.25).heads
    positive, negative = heads.fg_bg_sampler([torch.tensor([1] * 40 + [0] * 40)])
    assert (int(positive[0].sum()), int(negative[0].sum())) == (4, 12)


def test_box_deltas_have_the_weights_10_10_5_5() -> None:
    """For (dx, dy, dw, dh); those of proposals have no weights."""
    boxes, regions = torch.tensor([[20.0, 40.0, 140.0, 120.0]]), torch.tensor([[20.0, 20.0, 60.0, 60.0]])
    plain = torch.tensor([[40 / 40, 40 / 40, math.log(3), math.log(2)]])
    model = detector()
    torch.testing.assert_close(model.proposals.box_coder.encode_single(boxes, regions), plain)
    torch.testing.assert_close(
        model.heads.box_coder.encode_single(boxes, regions), plain * torch.tensor([10.0, 10.0, 5.0, 5.0])
    )


def test_regions_are_pooled_with_as_many_samples_as_cells() -> None:
    model = detector(roi_size=2)
    features = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x0, y0, x1, y1 = 10.0, 14.0, 74.0, 62.0  # at stride 8: 8 x 6 cells, so 4 x 3 samples per bin
    pooled = model.heads.box_roi_pool(features, [torch.tensor([[x0, y0, x1, y1]])])[0, 0]
    for row in range(2):
        for column in range(2):
            samples = [
                bilinear(
                    features[0, 0],
                    (y0 + (y1 - y0) * (row + (i + 0.5) / 3) / 2) / 8 - 0.5,
                    (x0 + (x1 - x0) * (column + (j + 0.5) / 4) / 2) / 8 - 0.5,
                    clamp=True,
                )
                for i in range(3)
                for j in range(4)
            ]
            assert float(pooled[row, column]) == pytest.approx(sum(samples) / 12, abs=1e-5)


class FixedPredictor(nn.Module):
    """A box predictor with fixed outputs."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.answers = logits, deltas

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        return self.answers


def detections(logits: Tensor, deltas: Tensor, regions: Tensor, **changes: object) -> dict[str, Tensor]:
    """Output of the heads when the box predictor returns `logits` and `deltas`."""
    model = detector(**changes).eval()
    model.heads.box_predictor = FixedPredictor(logits, deltas)
    with torch.no_grad():
        found, _ = model.heads(torch.zeros(1, 16, 600, 600), [regions], [(4000, 4000)])
    result: dict[str, Tensor] = found[0]
    return result


def test_each_class_has_its_own_box() -> None:
    """The second of three classes uses the second four numbers, a shift of 0.3 of the width."""
    deltas = torch.zeros(1, 12)
    deltas[0, 4] = 3.0  # tenths
    logits = torch.tensor([[0.0, 0.0, 20.0, 0.0]])
    found = detections(logits, deltas, torch.tensor([[100.0, 100.0, 300.0, 200.0]]))
    assert found["labels"].tolist()[0] == 2
    torch.testing.assert_close(found["boxes"][0], torch.tensor([160.0, 100.0, 360.0, 200.0]))


def test_detections_of_a_class_are_suppressed_at_iou_05() -> None:
    def labels(overlap: float, *classes: int) -> list[int]:
        logits = torch.full((2, 4), -9.0)
        logits[:, 0] = 0.0
        for row, (label, score) in enumerate(zip(classes, (9.0, 8.0), strict=True)):
            logits[row, label] = score
        regions = overlapping(1.0, overlap)
        found = detections(logits, torch.zeros(2, 12), regions, score_threshold=0.5)["labels"]
        result: list[int] = found.tolist()
        return result

    assert labels(0.49, 1, 1) == [1, 1]
    assert labels(0.51, 1, 1) == [1]
    assert labels(0.51, 1, 2) == [1, 2]  # boxes of other classes do not matter


@pytest.mark.parametrize("training", [True, False])
def test_boxes_are_predicted_from_the_mean_of_a_region(training: bool) -> None:
    model = detector().train(training)
    seen: list[Tensor] = []
    model.heads.box_head.register_forward_hook(lambda *call: seen.append(call[2].mean(dim=(2, 3))))
    model.heads.box_predictor.register_forward_hook(lambda *call: seen.append(call[1][0]))
    targets = [{"boxes": torch.tensor([[4.0, 5.0, 30.0, 24.0]]), "labels": torch.tensor([1])}]
    model(torch.randn(1, 3, 64, 64), [(64, 64)], targets if training else None)
    assert torch.equal(seen[0], seen[1])


def test_the_best_detections_above_the_threshold_are_kept() -> None:
    regions = torch.tensor([[200.0 * i, 0, 200.0 * i + 100, 100] for i in range(6)])
    logits = torch.full((6, 4), -30.0)
    logits[:, 0] = 0.0
    logits[:, 3] = torch.tensor([0.1, 0.4, -0.2, 0.3, 0.2, -0.1])  # probability above 0.5 if positive
    shown = {"score_threshold": 0.5, "max_detections": 3}
    found = detections(logits, torch.zeros(6, 12), regions, **shown)
    torch.testing.assert_close(found["scores"], torch.tensor([0.4, 0.3, 0.2]).sigmoid())
    assert set(found["labels"].tolist()) == {3}
    assert (
        len(detections(logits, torch.zeros(6, 12), regions, **{**shown, "max_detections": 9})["scores"])
        == 4
    )


def test_new_layers_have_the_published_initial_weights() -> None:
    """Standard deviations 0.01 (classes, proposals), 0.001 (boxes, masks), and those of He et al. 2015."""
    torch.manual_seed(0)
    model = build(ENCODER, 80, small_model(masks=True))
    heads = model.heads
    assert heads.mask_predictor is not None
    deconvolution, _, masks = heads.mask_predictor
    expected = [
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
        (masks, 0.001),
        # (in, out, 2, 2): in torch, fan_out is the first axis times the four cells of the kernel.
        (deconvolution, (2 / (deconvolution.weight.shape[0] * 4)) ** 0.5),
        (model.proposals.head.conv[0][0], 0.01),
        (model.proposals.head.cls_logits, 0.01),
    ]
    for layer, std in expected:
        weight = layer.weight.detach()
        assert float(weight.std()) == pytest.approx(std, rel=4 / (2 * weight.numel()) ** 0.5), layer
        assert not layer.bias.any(), layer


def test_proposals_are_inside_the_image_without_padding() -> None:
    model = detector().eval().proposals
    features = torch.randn(2, 16, 8, 10)
    with torch.no_grad():
        proposals, _ = model(ImageList(features, [(64, 80), (40, 30)]), {"res4": features})
    assert float(proposals[0][:, 2].max()) > 30
    assert float(proposals[1][:, 2].max()) <= 30
    assert float(proposals[1][:, 3].max()) <= 40
