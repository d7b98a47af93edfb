"""The C4 model compared with the published layers (detectron2's names and shapes, written out here),
with losses in loops, and with closed forms of anchors and pooling.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from mochi.config import DetectionModel, Encoder
from mochi.detection.model import Anchors, Detector, box_losses, build
from tests.detection.sets import ENCODER, small_model

PAPER = DetectionModel(
    masks=False, anchor_sizes=[32, 64, 128, 256, 512], anchor_ratios=[0.5, 1, 2], rpn_batch=256,
    proposals_train=[12000, 2000], proposals_test=[6000, 1000], roi_size=14, roi_batch=512,
    roi_positive=0.25, score_threshold=0.05, max_detections=100,
)  # fmt: skip
PAPER_ENCODER = Encoder(architecture="resnet50", stem="imagenet", width=64)


def published_layers(num_classes: int, masks: bool) -> dict[str, tuple[int, ...]]:
    """detectron2's Base-RCNN-C4 with MoCo's Res5ROIHeadsExtraNorm: parameter name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.stem.conv1.weight": (64, 3, 7, 7)}
    norms = {"backbone.stem.conv1.norm": 64}
    channels = 64
    for stage, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=2):
        module = "backbone" if stage < 5 else "roi_heads"
        for block in range(blocks):
            prefix = f"{module}.res{stage}.{block}"
            shapes |= {
                f"{prefix}.conv1.weight": (inner, channels, 1, 1),
                f"{prefix}.conv2.weight": (inner, inner, 3, 3),
                f"{prefix}.conv3.weight": (4 * inner, inner, 1, 1),
            }
            norms |= {
                f"{prefix}.conv{n}.norm": width for n, width in ((1, inner), (2, inner), (3, 4 * inner))
            }
            if block == 0:
                shapes[f"{prefix}.shortcut.weight"] = (4 * inner, channels, 1, 1)
                norms[f"{prefix}.shortcut.norm"] = 4 * inner
            channels = 4 * inner
    norms["roi_heads.res5.norm"] = 2048
    biased = {
        "proposal_generator.rpn_head.conv": (1024, 1024, 3, 3),
        "proposal_generator.rpn_head.objectness_logits": (15, 1024, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas": (60, 1024, 1, 1),
        "roi_heads.box_predictor.cls_score": (num_classes + 1, 2048),
        "roi_heads.box_predictor.bbox_pred": (4 * num_classes, 2048),
    }
    if masks:
        biased["roi_heads.mask_head.predictor"] = (num_classes, 256, 1, 1)
        shapes |= {
            "roi_heads.mask_head.deconv.weight": (2048, 256, 2, 2),
            "roi_heads.mask_head.deconv.bias": (256,),
        }
    for name, shape in biased.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


@pytest.mark.parametrize(
    ("num_classes", "masks", "total"), [(20, False, 33_234_160), (80, True, 35_966_828)]
)
def test_r50_c4_has_the_published_layers(num_classes: int, masks: bool, total: int) -> None:
    with torch.device("meta"):
        model = build(PAPER_ENCODER, num_classes, PAPER.model_copy(update={"masks": masks}))
    expected = published_layers(num_classes, masks)
    assert Counter(tuple(p.shape) for p in model.parameters()) == Counter(expected.values())
    assert sum(p.numel() for p in model.parameters()) == total
    parts = {
        "backbone.": "backbone.", "heads.box_head.": "roi_heads.res5.", "proposals.": "proposal_generator.",
        "heads.box_predictor.": "roi_heads.box_predictor.", "heads.mask_predictor.": "roi_heads.mask_head.",
    }  # fmt: skip
    for ours, theirs in parts.items():
        assert Counter(
            tuple(p.shape) for name, p in model.named_parameters() if name.startswith(ours)
        ) == Counter(shape for name, shape in expected.items() if name.startswith(theirs)), ours


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 16), ("half", 8), ("full", 4)])
def test_the_stride_is_that_of_res4(stem: str, stride: int) -> None:
    model = build(Encoder(architecture="resnet10", stem=stem, width=4), 2, small_model())
    assert model.proposals.anchor_generator.stride == stride
    assert model.backbone(torch.zeros(1, 3, 64, 96)).shape[-2:] == (64 // stride, 96 // stride)


def test_anchors_in_closed_form() -> None:
    images = ImageList(torch.zeros(1), [(48, 80)])
    anchors = Anchors([32.0, 64.0], [0.5, 1.0, 2.0], stride=16)(images, [torch.zeros(1, 8, 3, 5)])[0]
    boxes = anchors.reshape(3, 5, 6, 4)
    widths, heights = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    sizes, ratios = torch.tensor([32.0] * 3 + [64.0] * 3), torch.tensor([0.5, 1.0, 2.0] * 2)
    torch.testing.assert_close((widths * heights).sqrt(), sizes.expand(3, 5, 6))
    torch.testing.assert_close(heights / widths, ratios.expand(3, 5, 6))
    torch.testing.assert_close(
        (boxes[..., 0] + boxes[..., 2]) / 2, (16.0 * torch.arange(5))[None, :, None].expand(3, 5, 6)
    )
    torch.testing.assert_close(
        (boxes[..., 1] + boxes[..., 3]) / 2, (16.0 * torch.arange(3))[:, None, None].expand(3, 5, 6)
    )


def test_pooling_is_aligned_to_half_pixels() -> None:
    """On the map f(x) = x, the value of a bin is its centre; the centres of cells are half-integers."""
    model = build(ENCODER, 2, small_model(roi_size=4))
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    pooled = model.heads.box_roi_pool(ramp, [torch.tensor([[24.0, 16.0, 88.0, 80.0]])])
    width = (88 - 24) / 8 / 4
    expected = 24 / 8 + (torch.arange(4) + 0.5) * width - 0.5
    torch.testing.assert_close(pooled[0, 0], expected.expand(4, 4))


def test_head_losses_equal_those_in_loops() -> None:
    torch.manual_seed(0)
    logits, deltas = torch.randn(6, 4), torch.randn(6, 12)
    labels, targets = torch.tensor([0, 3, 1, 0, 3, 2]), torch.randn(6, 4)
    classifier = sum(-torch.log_softmax(logits[i], 0)[labels[i]] for i in range(6)) / 6
    boxes = torch.tensor(0.0)
    for i in range(6):
        if labels[i] > 0:
            first = 4 * (int(labels[i]) - 1)
            boxes += (deltas[i, first : first + 4] - targets[i]).abs().sum()
    losses = box_losses(logits, deltas, labels, targets)
    torch.testing.assert_close(losses["loss_classifier"], classifier)
    torch.testing.assert_close(losses["loss_box_reg"], boxes / 6)


def test_proposal_losses_are_l1_over_the_samples_asked_for() -> None:
    model = build(ENCODER, 2, small_model(rpn_batch=4))
    labels = [torch.tensor([1.0, -1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])]
    objectness, deltas = torch.randn(8, 1), torch.randn(8, 4)
    targets = [torch.randn(4, 4), torch.randn(4, 4)]
    loss, box_loss = model.proposals.compute_loss(objectness, deltas, labels, targets)
    # All five labelled anchors are sampled: 2 + 3 of 4 per image.
    flat, all_targets = torch.cat(labels), torch.cat(targets)
    expected = sum(
        F.binary_cross_entropy_with_logits(objectness[i, 0], flat[i]) for i in range(8) if flat[i] >= 0
    )
    torch.testing.assert_close(loss, torch.as_tensor(expected) / 8)
    torch.testing.assert_close(box_loss, (deltas[[0, 6]] - all_targets[[0, 6]]).abs().sum() / 8)


def targets(*numbers: int, masks: bool = False) -> list[dict[str, Tensor]]:
    images = []
    for number in numbers:
        boxes = torch.tensor([[4.0 + i, 5.0, 20.0 + i, 24.0] for i in range(number)]).reshape(-1, 4)
        target = {"boxes": boxes, "labels": 1 + torch.arange(number) % 2}
        if masks:
            target["masks"] = torch.zeros(number, 32, 48, dtype=torch.uint8)
            target["masks"][:, 5:24, 4:20] = 1
        images.append(target)
    return images


def train_step(model: Detector, wanted: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    images = torch.randn(len(wanted), 3, 32, 48, generator=torch.Generator().manual_seed(1))
    losses: dict[str, Tensor] = model.train()(images, [(32, 48)] * len(wanted), wanted)
    sum(losses.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    return losses


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("numbers", [(2, 0, 3), (0, 0), (2,)], ids=["mixed", "only empty", "batch of 1"])
def test_losses_are_finite(masks: bool, numbers: tuple[int, ...]) -> None:
    losses = train_step(build(ENCODER, 2, small_model(masks=masks)), targets(*numbers, masks=masks))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert ("loss_mask" in losses) == masks
    if sum(numbers) == 0:
        assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0


def test_every_layer_has_a_gradient() -> None:
    model = build(ENCODER, 2, small_model(masks=True))
    train_step(model, targets(2, 3, masks=True))
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_features_of_a_frozen_backbone_give_the_same_detections() -> None:
    model = build(ENCODER, 2, small_model(masks=True)).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        whole = model(images, [(32, 48), (30, 40)])
        parts = model.from_features(model.backbone(images), [(32, 48), (30, 40)])
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == {"boxes", "scores", "labels", "masks"}
        for name in one:
            torch.testing.assert_close(one[name], other[name])
    height, width = 30, 40
    assert (whole[1]["boxes"][:, 2] <= width).all()
    assert (whole[1]["boxes"][:, 3] <= height).all()
    assert set(whole[0]["labels"].tolist()) <= {1, 2}
    assert whole[0]["masks"].shape == (len(whole[0]["boxes"]), 1, 4, 4)


def test_without_detections_there_are_no_masks() -> None:
    model = build(ENCODER, 2, small_model(masks=True, score_threshold=0.999)).eval()
    with torch.no_grad():
        result = model(torch.randn(1, 3, 32, 48), [(32, 48)])[0]
    assert result["boxes"].shape == (0, 4)
    assert len(result["masks"]) == 0


def test_a_single_detection_has_a_mask() -> None:
    model = build(ENCODER, 2, small_model(masks=True, score_threshold=0, max_detections=1)).eval()
    with torch.no_grad():
        result = model(torch.randn(1, 3, 32, 48), [(32, 48)])[0]
    assert result["boxes"].shape == (1, 4)
    assert result["masks"].shape == (1, 1, 4, 4)


def test_boxes_are_computed_in_float32() -> None:
    """In bfloat16, decoding and pooling would round boxes to a grid of pixels."""
    model = build(ENCODER, 2, small_model(masks=True))
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_step(model, targets(2, 3, masks=True))
        with torch.no_grad():
            features = model.eval().backbone(torch.randn(1, 3, 32, 48))
            logits, deltas = model.proposals.head([features])
            result = model.from_features(features, [(32, 48)])[0]
    tensors = [
        features,
        *logits,
        *deltas,
        *losses.values(),
        result["boxes"],
        result["scores"],
        result["masks"],
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_head_losses_of_a_single_region() -> None:
    logits, deltas, target = torch.randn(1, 4), torch.randn(1, 12), torch.randn(1, 4)
    losses = box_losses(logits, deltas, torch.tensor([2]), target)
    torch.testing.assert_close(losses["loss_classifier"], -logits.log_softmax(1)[0, 2])
    torch.testing.assert_close(losses["loss_box_reg"], (deltas[0, 4:8] - target[0]).abs().sum())


def test_each_detection_has_the_mask_of_its_class() -> None:
    """A mask head whose answer is a constant for each class, at random weights of the box head."""

    class Constant(torch.nn.Module):
        def forward(self, regions: Tensor) -> Tensor:
            return torch.tensor([-1.0, 0.5, 2.0])[:, None, None].expand(len(regions), 3, 4, 4)

    torch.manual_seed(0)
    model = build(ENCODER, 3, small_model(masks=True, max_detections=30)).eval()
    model.heads.mask_predictor = Constant()
    with torch.no_grad():
        results = model(torch.randn(2, 3, 32, 48), [(32, 48), (30, 40)])
    expected = torch.tensor([-1.0, 0.5, 2.0]).sigmoid()
    assert {int(label) for result in results for label in result["labels"]} == {1, 2, 3}
    for result in results:
        wanted = expected[result["labels"] - 1][:, None, None, None].expand(-1, 1, 4, 4)
        torch.testing.assert_close(result["masks"], wanted)
