"""The probe's own gradient and update against autograd and torch's SGD; that it changes nothing but itself;
and that candidates are compared on rows they did not see."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mochi import pretrain
from mochi.config import Experiment, LinearProbe, resolve
from mochi.evaluation import linear
from mochi.evaluation.features import encoder_digest, load_encoder
from mochi.running.health import NonFiniteError

PROTOCOL = LinearProbe(
    protocol="test", epochs=4, batch_size=8, lr=0.5, lr_candidates=[0.05], momentum=0.9,
    weight_decay=0.01, lr_drops=[2], lr_drop_factor=0.1, min_scale=None,
)  # fmt: skip


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_equals_autograd_and_torchs_sgd(index: int) -> None:
    """Classifiers 0, 1: both rates on all rows; 2, 3: both rates without the held-out rows."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 5, generator=generator)
    labels = torch.randint(3, (8,), generator=generator)
    held_out = torch.tensor([True, False] * 4)
    probes = linear.Probes(PROTOCOL, 5, 3, seed=1, device=torch.device("cpu"))
    weight = probes._weight[index].clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=probes.rates[index % 2], momentum=0.9, weight_decay=0.01)
    seen = torch.ones(8, dtype=torch.bool) if index < 2 else ~held_out
    for epoch in range(4):
        probes.step(features, labels, held_out, epoch)
        for group in optimizer.param_groups:
            group["lr"] = probes.rates[index % 2] * (0.1 if epoch >= 2 else 1.0)
        optimizer.zero_grad()
        logits = F.pad(features[seen], (0, 1), value=1.0) @ weight
        F.cross_entropy(logits, labels[seen]).backward()
        optimizer.step()
        torch.testing.assert_close(probes._weight[index], weight.detach(), rtol=1e-5, atol=1e-6)


def test_scores_are_top1_and_top5_in_percent() -> None:
    probes = linear.Probes(PROTOCOL, 2, 7, seed=0, device=torch.device("cpu"))
    probes._weight.zero_()
    probes._weight[:, -1] = torch.arange(7.0)  # every image: class 6 first, then 5, 4, 3, 2
    scores = probes.scores(torch.zeros(4, 2), torch.tensor([6, 5, 2, 1]))
    assert scores[0] == {"top1": 25.0, "top5": 75.0}


@pytest.mark.parametrize("min_scale", [None, 0.2])
def test_the_stage_leaves_the_encoder_as_it_was(
    tiny: Experiment, tiny_data: Path, tmp_path: Path, min_scale: float | None
) -> None:
    run = resolve(tiny, "random-init", 0)
    protocol = run.evaluation.linear
    assert protocol is not None
    evaluation = run.evaluation.model_copy(
        update={"linear": protocol.model_copy(update={"min_scale": min_scale})}
    )
    run = run.model_copy(update={"evaluation": evaluation})
    pretrain.run(run, tiny_data, tmp_path, tmp_path)
    file = tmp_path / "encoder.safetensors"
    before = file.read_bytes(), encoder_digest(load_encoder(file, run.encoder, torch.device("cpu")))
    linear.run(run, tiny_data, file, tmp_path / "linear")
    after = file.read_bytes(), encoder_digest(load_encoder(file, run.encoder, torch.device("cpu")))
    assert before == after
    metrics = json.loads((tmp_path / "linear" / "metrics.json").read_text())
    # 16 photographs, 4 patches each: far above the 6.25 % of a guess even for an untrained encoder.
    assert metrics["top1"] > 12.5
    assert metrics["top1"] <= metrics["top5"] <= 100
    assert metrics["protocol"] == "features-sgd"
    assert set(metrics["held_out_top1"]) == {"0.1", "1"}
    assert metrics["best_lr"] in {0.1, 1.0}


def test_a_moving_encoder_is_caught(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    """In training mode the running statistics move, and the digest sees it."""
    run = resolve(tiny, "random-init", 0)
    pretrain.run(run, tiny_data, tmp_path, tmp_path)
    encoder = load_encoder(tmp_path / "encoder.safetensors", run.encoder, torch.device("cpu"))
    before = encoder_digest(encoder)
    encoder(torch.randn(4, 3, 16, 16))
    assert encoder_digest(encoder) == before
    encoder.train()(torch.randn(4, 3, 16, 16))
    assert encoder_digest(encoder) != before


def test_a_diverged_protocol_stops_and_a_diverged_candidate_loses() -> None:
    scores = [{"top1": 50.0, "top5": 90.0}, {"top1": math.nan, "top5": math.nan}]
    metrics = linear._metrics(PROTOCOL, [0.5, 0.05], scores, [40.0, -1.0], 8, 4)
    assert metrics["best_lr"] == 0.5
    with pytest.raises(NonFiniteError, match=r"diverged at the protocol's learning rate 0\.5"):
        linear._metrics(PROTOCOL, [0.5, 0.05], scores[::-1], [-1.0, 40.0], 8, 4)


def test_held_out_rows_are_a_random_share() -> None:
    marks = linear.held_out_rows(100, 0.1, seed=0)
    assert marks.sum() == 10
    assert not torch.equal(marks, linear.held_out_rows(100, 0.1, seed=1))
