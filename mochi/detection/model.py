"""Faster and Mask R-CNN with a C4 backbone, from torchvision's parts.

conv1 to res4 process the whole image; res5 each pooled region, followed by the extra batch
normalisation of MoCo's Res5ROIHeadsExtraNorm, and feeds both boxes and masks. Every number that the
detectron2 C4 configuration fixes is here or in the experiment file; docs/detection.md compares
each with torchvision's default.

Shapes: B images, R regions of all images, A anchors of an image, K classes, D channels of res5.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import RoIAlign, roi_align

from mochi import encoders
from mochi.config import DetectionModel, Encoder
from mochi.encoders.resnet import ResNet
from mochi.encoders.shared_batch_norm import SharedBatchNorm2d

Target = dict[str, Tensor]


class Backbone(nn.Module):
    """conv1 to res4 of an encoder; parameters have the encoder's names."""

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = (
            encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool
        )  # fmt: skip
        self.layer1, self.layer2, self.layer3 = encoder.layer1, encoder.layer2, encoder.layer3

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / stride, W / stride) rounded up, float32 even under autocast."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.float()


class RegionHead(nn.Module):
    """res5 and MoCo's extra normalisation, (R, C, S, S) -> (R, D, S/2, S/2), float32."""

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        self.layer4 = encoder.layer4
        self.norm = SharedBatchNorm2d(encoder.num_features)

    def forward(self, regions: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.norm(self.layer4(regions))
        return features.float()


class Anchors(nn.Module):
    """Anchors of every cell of one feature map, exact (detectron2), not rounded (torchvision)."""

    cells: Tensor

    def __init__(self, sizes: list[float], ratios: list[float], stride: int) -> None:
        super().__init__()
        size, ratio = torch.tensor(sizes)[:, None], torch.tensor(ratios)[None, :]
        widths, heights = size / ratio.sqrt(), size * ratio.sqrt()
        corners = torch.stack([-widths, -heights, widths, heights], dim=-1) / 2
        self.register_buffer("cells", corners.reshape(-1, 4), persistent=False)  # (a, 4)
        self.stride = stride

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        """One (A, 4) for each image, the same for all; row-major over the map, then over `cells`."""
        height, width = features[0].shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(height, device=self.cells.device) * self.stride,
            torch.arange(width, device=self.cells.device) * self.stride,
            indexing="ij",
        )
        centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        return [(centres + self.cells).reshape(-1, 4)] * len(images.image_sizes)


class _FloatRPNHead(RPNHead):  # type: ignore[misc]
    """torchvision's head; its outputs are float32, because box decoding in bfloat16 loses pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [item.float() for item in logits], [item.float() for item in deltas]


class Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposals with detectron2's loss: L1, divided by requested samples."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss over the anchors sampled."""
        positive, negative = (
            torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels)
        )  # indices into the A * B anchors
        sampled = torch.cat([positive, negative])
        samples = self.fg_bg_sampler.batch_size_per_image * len(labels)
        box_loss = F.l1_loss(
            pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum"
        )
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        return objectness_loss / samples, box_loss / samples


class BoxPredictor(nn.Module):
    """Class scores of K + 1 (background first) and one box for each of the K classes."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(num_features, num_classes + 1)
        self.bbox_pred = nn.Linear(num_features, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D) -> (R, K + 1), (R, 4 K)."""
        return self.cls_score(features).float(), self.bbox_pred(features).float()


class MaskPredictor(nn.Sequential):
    """A deconvolution to 256 channels and one mask for each class, (R, D, s, s) -> (R, K, 2 s, 2 s)."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        deconvolution, masks = nn.ConvTranspose2d(num_features, 256, 2, 2), nn.Conv2d(256, num_classes, 1)
        super().__init__(deconvolution, nn.ReLU(), masks)
        nn.init.kaiming_normal_(deconvolution.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(masks.weight, std=0.001)
        for layer in (deconvolution, masks):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


class Res5RoIHeads(RoIHeads):  # type: ignore[misc]
    """detectron2's Res5ROIHeads: boxes and masks share the features of res5.

    In training the masks are trained on the positive regions of the box head; in evaluation they are
    computed for the detected boxes.
    """

    def forward(
        self,
        features: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Features (B, C, h, w) and proposals -> detections (evaluation) or losses (training)."""
        if self.training:
            proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
            regions = self._regions(features, proposals)
            logits, deltas = self.box_predictor(regions.mean((2, 3)))
            losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(box_targets))
            if self.mask_predictor is not None:
                assert targets is not None
                losses["loss_mask"] = self._mask_loss(
                    regions, proposals, matched, labels, targets, image_shapes
                )
            return [], losses
        regions = self._regions(features, proposals)
        logits, deltas = self.box_predictor(regions.mean((2, 3)))
        # torchvision expects a box for the background too, and drops it.
        found = self.postprocess_detections(logits, F.pad(deltas, (4, 0)), proposals, image_shapes)
        detections = [
            {"boxes": boxes, "scores": scores, "labels": labels}
            for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.mask_predictor is not None:
            self._add_masks(features, detections)
        return detections, {}

    def _regions(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        """(R, D, s, s)."""
        regions: Tensor = self.box_head(self.box_roi_pool(features, boxes))
        return regions

    def _mask_loss(
        self,
        regions: Tensor,
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[Target],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        all_labels = torch.cat(labels)
        rows = torch.where(all_labels > 0)[0]
        logits = self.mask_predictor(regions[rows]).float()
        target_masks = []
        for boxes, match, label, target, size in zip(
            proposals, matched, labels, targets, image_shapes, strict=True
        ):
            own = torch.where(label > 0)[0]
            target_masks.append(
                mask_targets(boxes[own], target["masks"], match[own], size, logits.shape[-1])
            )
        chosen = logits[torch.arange(len(rows), device=rows.device), all_labels[rows] - 1]
        total = F.binary_cross_entropy_with_logits(chosen, torch.cat(target_masks), reduction="sum")
        loss: Tensor = total / max(chosen.numel(), 1)
        return loss

    def _add_masks(self, features: Tensor, detections: list[Target]) -> None:
        """Select for each detection the mask of its class, (n, 1, m, m) probabilities inside its box."""
        boxes = [detection["boxes"] for detection in detections]
        if sum(len(each) for each in boxes) == 0:
            for detection in detections:
                detection["masks"] = features.new_zeros(0, 1, 1, 1)
            return
        mask_logits = self.mask_predictor(self._regions(features, boxes)).float()
        masks = maskrcnn_inference(mask_logits, [detection["labels"] - 1 for detection in detections])
        for detection, mask in zip(detections, masks, strict=True):
            detection["masks"] = mask


def mask_targets(
    boxes: Tensor, masks: Tensor, matched: Tensor, image_size: tuple[int, int], side: int
) -> Tensor:
    """(R, side, side) of 0 and 1: the part of a region's object inside the region.

    Args:
        boxes: (R, 4) regions of one image.
        masks: (n, h, w) of its objects; they cover the image at any resolution.
        matched: (R,) the object of each region.
        image_size: (height, width) of the image that the boxes are in.
        side: cells of the result.

    Source: detectron2 structures/masks.py BitMasks.crop_and_resize: aligned to half-pixel centres, as many
    samples as pixels, at least .5. Deviation: its polygons are cut at the region without being drawn first;
    here they are drawn at the size of the original image, never resized.
    """
    scale_y, scale_x = masks.shape[-2] / image_size[0], masks.shape[-1] / image_size[1]
    x0, y0, x1, y1 = boxes.unbind(1)
    regions = torch.stack([matched, x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y], dim=1)
    covered: Tensor = roi_align(masks[:, None].float(), regions, side, sampling_ratio=-1, aligned=True)
    return (covered[:, 0] >= 0.5).float()


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, box_targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, and L1 on the own class's box; both divided by the number of regions R.

    Args:
        logits: (R, K + 1).
        deltas: (R, 4 K), classes 1 to K.
        labels: (R,), 0 is the background.
        box_targets: (R, 4).
    """
    positive = torch.where(labels > 0)[0]
    own = deltas.reshape(len(deltas), -1, 4)[positive, labels[positive] - 1]
    regions = max(len(labels), 1)
    return {
        "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / regions,
        "loss_box_reg": F.l1_loss(own, box_targets[positive], reduction="sum") / regions,
    }


class Detector(nn.Module):
    """(B, 3, H, W) images, resized, normalised and padded to one size -> losses or detections.

    torchvision's GeneralizedRCNN resizes images by itself, in evaluation too; here the caller chooses the
    sizes, and boxes are in the coordinates of the images given.
    """

    def __init__(self, encoder: ResNet, stride: int, num_classes: int, config: DetectionModel) -> None:
        super().__init__()
        self.backbone = Backbone(encoder)
        # res4 has half as many channels as res5 in every ResNet.
        channels = encoder.num_features // 2
        anchors = Anchors(config.anchor_sizes, config.anchor_ratios, stride)
        pre_nms, post_nms = zip(config.proposals_train, config.proposals_test, strict=True)
        self.proposals = Proposals(
            anchors,
            _FloatRPNHead(channels, len(anchors.cells)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=config.rpn_batch,
            positive_fraction=0.5,
            pre_nms_top_n={"training": pre_nms[0], "testing": pre_nms[1]},
            post_nms_top_n={"training": post_nms[0], "testing": post_nms[1]},
            nms_thresh=0.7,
        )
        self.heads = Res5RoIHeads(
            # sampling_ratio 0: as many points as the region has cells; aligned: half-pixel centres.
            RoIAlign(config.roi_size, spatial_scale=1 / stride, sampling_ratio=0, aligned=True),
            RegionHead(encoder),
            BoxPredictor(encoder.num_features, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=config.roi_batch,
            positive_fraction=config.roi_positive,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=config.score_threshold,
            nms_thresh=0.5,
            detections_per_img=config.max_detections,
            mask_predictor=MaskPredictor(encoder.num_features, num_classes) if config.masks else None,
        )

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[Target] | None = None
    ) -> Any:
        """Losses by name (training) or, for each image, boxes, scores, labels and masks (evaluation).

        Args:
            images: (B, 3, H, W).
            sizes: (height, width) of each image without its padding.
            targets: for each image boxes (n, 4), labels (n,) from 1 and, with masks, masks (n, h, w), which
                cover the image at any resolution.
        """
        return self.from_features(self.backbone(images), sizes, targets)

    def from_features(
        self, features: Tensor, sizes: list[tuple[int, int]], targets: list[Target] | None = None
    ) -> Any:
        """The same from the backbone's features (B, C, h, w), for a backbone that is frozen."""
        images = ImageList(features, sizes)
        proposals, proposal_losses = self.proposals(images, {"res4": features}, targets)
        detections, losses = self.heads(features, proposals, sizes, targets)
        return {**losses, **proposal_losses} if self.training else detections


def build(encoder_config: Encoder, num_classes: int, config: DetectionModel) -> Detector:
    """A randomly initialised detector around an encoder of `encoder_config`; see `load_backbone`.

    The feature stride is that of res4: 16 with the imagenet stem, 8 and 4 with the small ones.
    """
    encoder = encoders.build(encoder_config, norm_layer=SharedBatchNorm2d)
    assert isinstance(encoder, ResNet)
    return Detector(encoder, encoder.stride, num_classes, config)
