"""The analysis stage: analyse an encoder on the validation images."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mochi.analysis.embedding_map import project_2d
from mochi.analysis.geometry import alignment, uniformity
from mochi.analysis.neighbours import evenly_spaced, nearest
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
"""Maximum number of images; evenly spaced in a larger split."""
_MAPPED, _QUERIES, _NEIGHBOURS = 300, 8, 6


def run(run: AnalysisRun, result: Result, *, workers: int = 0) -> None:
    """Analyse a frozen encoder on the validation images, or on those of train if there are none.

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
    dataset = open_dataset(result.inputs["data"].parent)
    split = _split(dataset)
    rows = evenly_spaced(len(split), MAX_IMAGES).numpy()
    spaces = _spaces(run, result, split, rows, device, workers)
    labels = torch.from_numpy(split.labels[rows])
    classes = [dataset.classes[label] if label >= 0 else None for label in labels.tolist()]
    queries, mapped = (
        evenly_spaced(len(rows), _QUERIES).tolist(),
        evenly_spaced(len(rows), _MAPPED).tolist(),
    )
    similar = {name: _similar(space, queries) for name, space in spaces.items()}
    points, map_method = project_2d(spaces["pooled"].cpu().numpy()[mapped])

    def described(row: int) -> dict[str, Any]:
        return {"image": split.path(rows[row]), "class": classes[row]}

    analysis = {
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
        "queries": [
            described(query)
            | {
                name: [described(row) | {"similarity": round(value, 4)} for row, value in found[query]]
                for name, found in similar.items()
            }
            for query in queries
        ],
        "map_method": map_method,
    }
    shown = {row for found in similar.values() for near in found.values() for row, _ in near}
    pictures = _pictures(split, sorted(shown.union(mapped, queries)), rows, run)
    sheet = [
        (pictures[query], [_tiles(found[query], query, pictures, classes) for found in similar.values()])
        for query in queries
    ]
    with publishing(result.folder) as new:
        write_json(new / "analysis.json", analysis)
        draw_sheet(new / "neighbours.jpg", sheet)
        draw_map(new / "map.jpg", points, [pictures[row] for row in mapped], labels[mapped].tolist())
        write_record(new, result, watch)


def _spaces(
    run: AnalysisRun,
    result: Result,
    split: StoredSplit,
    rows: NDArray[np.int64],
    device: torch.device,
    workers: int,
) -> dict[str, Tensor]:
    """(M, C) unit vectors of each space: the pooled features and, if the run has a head, the embeddings."""
    encoder = load_encoder(result.inputs["encoder"], run.encoder, device)
    loading = Loading(run.batch_size, device, workers)
    crops = centre_crops(split, loading, resize=run.resize, image_size=run.image_size, rows=rows)
    features = torch.cat([encode(encoder, batch.images) for batch in crops])
    spaces = {"pooled": F.normalize(features, dim=1)}
    if run.head is not None:
        head = load_head(result.inputs["head"], features.shape[1], run.embedding_dim, run.head)
        with torch.no_grad():
            spaces["embedded"] = F.normalize(head.to(device)(features), dim=1)
    return spaces


def load_head(path: Path, num_features: int, embedding_dim: int, kind: str) -> nn.Module:
    """The projection head that pretraining wrote, on the CPU, frozen.

    Raises:
        EncoderError: the file cannot be read or is a different head.
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


def _similar(space: Tensor, queries: list[int]) -> dict[int, list[tuple[int, float]]]:
    """For each query the most similar rows with their cosines."""
    indices, values = nearest(space, torch.tensor(queries, device=space.device), _NEIGHBOURS)
    found = [list(zip(*pair, strict=True)) for pair in zip(indices.tolist(), values.tolist(), strict=True)]
    return dict(zip(queries, found, strict=True))


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
    """The images as the encoder saw them, (S, S, 3) uint8, by their position in `rows`."""
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
