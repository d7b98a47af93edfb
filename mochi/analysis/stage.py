"""The analysis stage: look at what an encoder makes of the validation images."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mochi.analysis.embedding_map import flatten
from mochi.analysis.geometry import alignment, uniformity
from mochi.analysis.neighbours import nearest, spread
from mochi.analysis.pictures import Tile, draw_map, draw_sheet
from mochi.config import AnalysisRun
from mochi.data.format import StoredDataset, StoredSplit, open_dataset
from mochi.data.views.loading import Loading, centre_crops
from mochi.encoders.files import EncoderError, load_encoder, read_encoder
from mochi.encoders.heads import projection_head
from mochi.evaluation.features import encode
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD
from mochi.provenance.record import Stopwatch, write_record
from mochi.provenance.wanted import Result
from mochi.runtime.distributed import pick_device
from mochi.runtime.precision import make_deterministic
from mochi.storage.atomic import publishing, write_json

logger = logging.getLogger(__name__)

MAX_IMAGES = 10_000
"""Of a larger split so many, evenly spread."""
_MAPPED, _QUERIES, _NEIGHBOURS = 300, 8, 6


def run(run: AnalysisRun, result: Result, *, workers: int = 0) -> None:
    """Analyse a frozen encoder on the validation images, or on those of train where there are none.

    Args:
        run: the encoder and how images are cut.
        result: receives analysis.json, neighbours.jpg, map.jpg and provenance.json; its inputs are
            `encoder`, `head` and `data`, the manifest of the data set.
        workers: processes that load images.

    Raises:
        DataError, EncoderError: the data or the encoder do not fit.
    """
    watch = Stopwatch()
    device = pick_device()
    make_deterministic()
    encoder = load_encoder(result.inputs["encoder"], run.encoder, device)
    dataset = open_dataset(result.inputs["data"].parent)
    split = _split(dataset)
    rows = spread(len(split), MAX_IMAGES).numpy()
    loading = Loading(run.batch_size, device, workers)
    crops = centre_crops(split, loading, resize=run.resize, image_size=run.image_size, rows=rows)
    features = torch.cat([encode(encoder, batch.images) for batch in crops])
    spaces = {"pooled": F.normalize(features, dim=1)}
    if run.head is not None:
        head = load_head(result.inputs["head"], features.shape[1], run.embedding_dim, run.head)
        with torch.no_grad():
            spaces["embedded"] = F.normalize(head.to(device)(features), dim=1)
    labels = torch.from_numpy(split.labels[rows])
    analysis: dict[str, Any] = {
        "split": split.name,
        "num_images": len(rows),
        "num_labelled": int((labels >= 0).sum()),
        "spaces": {
            name: {
                "dim": space.shape[1],
                "alignment": alignment(space.cpu(), labels),
                "uniformity": uniformity(space),
            }
            for name, space in spaces.items()
        },
    }
    classes = [dataset.classes[label] if label >= 0 else None for label in labels.tolist()]
    queries = spread(len(rows), _QUERIES)
    found = {name: _similar(space, queries) for name, space in spaces.items()}
    analysis["queries"] = [
        {
            "image": split.path(rows[query]),
            "class": classes[query],
            **{
                name: [
                    {"image": split.path(rows[row]), "class": classes[row], "similarity": round(value, 4)}
                    for row, value in similar[index]
                ]
                for name, similar in found.items()
            },
        }
        for index, query in enumerate(queries.tolist())
    ]
    mapped = spread(len(rows), _MAPPED)
    places, analysis["map_method"] = flatten(spaces["pooled"].cpu().numpy()[mapped.numpy()])
    shown = {*mapped.tolist(), *queries.tolist()}
    shown |= {row for similar in found.values() for each in similar for row, _ in each}
    pictures = _pictures(split, sorted(shown), rows, run)
    with publishing(result.folder) as new:
        write_json(new / "analysis.json", analysis)
        draw_sheet(
            new / "neighbours.jpg",
            [
                (
                    pictures[query],
                    [_tiles(similar[index], query, pictures, classes) for similar in found.values()],
                )
                for index, query in enumerate(queries.tolist())
            ],
        )
        draw_map(
            new / "map.jpg",
            places,
            [pictures[row] for row in mapped.tolist()],
            labels[mapped].tolist(),
        )
        write_record(new, result, watch)


def load_head(path: Path, num_features: int, embedding_dim: int, kind: str) -> nn.Module:
    """The projection head that pretraining wrote, on the CPU, frozen.

    Raises:
        EncoderError: the file cannot be read or is another head.
    """
    head = projection_head(num_features, embedding_dim, kind)
    tensors = read_encoder(path).tensors
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if found != expected:
        raise EncoderError(
            f"{path}: found {found}; expected a {kind} head, {expected}; train this run again"
        )
    head.load_state_dict(tensors)
    return head.requires_grad_(requires_grad=False)


def _split(dataset: StoredDataset) -> StoredSplit:
    """Val, else train."""
    names = [name for name, entry in dataset.manifest["splits"].items() if entry["count"]]
    return dataset.split("val" if "val" in names else "train")


def _similar(space: Tensor, queries: Tensor) -> list[list[tuple[int, float]]]:
    """For each query the most similar rows with their cosines."""
    indices, values = nearest(space, queries.to(space.device), _NEIGHBOURS)
    return [
        list(zip(rows, cosines, strict=True))
        for rows, cosines in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _tiles(
    similar: Iterable[tuple[int, float]],
    query: int,
    pictures: dict[int, NDArray[np.uint8]],
    classes: list[str | None],
) -> list[Tile]:
    return [
        (
            pictures[row],
            None if classes[row] is None or classes[query] is None else classes[row] == classes[query],
        )
        for row, _ in similar
    ]


def _pictures(
    split: StoredSplit, shown: list[int], rows: NDArray[np.int64], run: AnalysisRun
) -> dict[int, NDArray[np.uint8]]:
    """The images as the encoder saw them, (S, S, 3) uint8, by their place in `rows`."""
    loading = Loading(run.batch_size, torch.device("cpu"), 0)
    crops = centre_crops(
        split, loading, resize=run.resize, image_size=run.image_size, rows=rows[np.array(shown)]
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = [
        (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
        for batch in crops
        for image in batch.images
    ]
    return dict(zip(shown, pixels, strict=True))
