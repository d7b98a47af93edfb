"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv:1805.01978)."""

import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mochi.config import Run
from mochi.data.format import open_dataset
from mochi.evaluation.features import extract_splits, load_encoder, precision_on
from mochi.provenance.record import Stopwatch, record
from mochi.runtime.distributed import pick_device
from mochi.runtime.precision import make_deterministic
from mochi.storage.atomic import write_json

logger = logging.getLogger(__name__)


def run(run: Run, data: Path, encoder_file: Path, out: Path, *, workers: int = 0) -> None:
    """Classify the validation images by their neighbours in train; write metrics.json and provenance.json.

    Args:
        run: names k and the temperature.
        data: folder of the prepared data set.
        encoder_file: the frozen encoder.
        out: receives the results.
        workers: processes that load images.

    Raises:
        DataError, EncoderError: what does not fit, and what to do.
    """
    watch = Stopwatch()
    assert run.evaluation is not None
    settings = run.evaluation.knn
    assert settings is not None
    device = pick_device()
    make_deterministic()
    encoder = load_encoder(encoder_file, run.encoder, device)
    dataset = open_dataset(data)
    train, train_labels, val, val_labels = extract_splits(run.evaluation, dataset, encoder, workers)
    k = min(settings.k, len(train))
    if k < settings.k:
        logger.warning("k = %d is larger than the %d labelled training images; using %d", settings.k, k, k)
    predicted = classify(
        train, train_labels, val, num_classes=len(dataset.classes), k=k, temperature=settings.temperature
    )
    write_json(
        out / "metrics.json",
        {
            "top1": round(100 * (predicted == val_labels).double().mean().item(), 4),
            "k": k,
            "temperature": settings.temperature,
            "num_train": len(train),
            "num_val": len(val),
        },
    )
    inputs = {"data": data / "manifest.json", "encoder": encoder_file}
    provenance = record("knn", run, __name__, inputs, watch, precision=precision_on(device))
    write_json(out / "provenance.json", provenance)


def classify(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = 256,
) -> Tensor:
    """Each row's class by a vote of its k most similar training rows, weight exp(cosine / temperature).

    Args:
        train: (M, D) features, any length; compared by cosine.
        train_labels: (M,) classes.
        val: (V, D) features.
        num_classes: number of classes.
        k: neighbours, at most M.
        temperature: of the weights.
        chunk: rows of `val` compared at once, so that memory stays (chunk, M).

    Returns:
        (V,) predicted classes.
    """
    train = F.normalize(train, dim=-1)
    predicted = []
    for rows in F.normalize(val, dim=-1).split(chunk):
        similarity, neighbours = (rows @ train.T).topk(k, dim=1)  # (chunk, k)
        # The largest weight is 1, so that a small temperature cannot overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), num_classes, device=rows.device, dtype=rows.dtype)
        votes.scatter_add_(1, train_labels[neighbours], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
