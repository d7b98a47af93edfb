"""MoCo's step compared with the algorithm written out here, and the properties that the papers require."""

import copy

import pytest
import torch
from torch.nn import functional as F

from mochi.config import ConfigError, Contrastive, Encoder
from mochi.contrast.moco import MoCo, Step, unit
from mochi.contrast.negatives import Synthetics, hardest, mix_pairs, mix_with_query
from mochi.contrast.rules import Candidates
from mochi.runtime.seeding import generator
from tests.reference import mochi_loss, synthetic_vectors

ENCODER = Encoder(architecture="resnet10", stem="half", width=4)


def recipe(**changes: object) -> Contrastive:
    values = {
        "objective": "contrastive", "epochs": 2, "batch_size": 8, "lr": 0.1, "momentum": 0.9,
        "weight_decay": 1e-4, "schedule": "cosine", "head": "mlp", "embedding_dim": 6, "queue_size": 20,
        "temperature": 0.2, "key_momentum": 0.9, "bn_groups": 2,
    }  # fmt: skip
    return Contrastive.model_validate({**values, **changes})


MOCHI = {"rule": "mochi", "num_hardest": 5, "num_pair_synthetics": 7, "num_query_synthetics": 3}


def images(seed: int, num: int = 8) -> torch.Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(8) % 3


def expected_synthetics(step: Step, generator: torch.Generator) -> list[Synthetics]:
    """The synthetics of the step, drawn a second time."""
    similarity = step.query @ step.queue.T
    pool = hardest(similarity, MOCHI["num_hardest"])
    pairs = mix_pairs(step.queue, pool, MOCHI["num_pair_synthetics"], generator)
    return [pairs, mix_with_query(similarity, pool, MOCHI["num_query_synthetics"], generator)]


def synthetics_of(step: Step) -> list[Synthetics]:
    """The synthetics that the step's rule mixes."""
    similarity = step.query @ step.queue.T
    if step.excluded is not None:
        similarity = similarity.masked_fill(step.excluded, -torch.inf)
    masked = step.excluded is not None
    return step.rule.synthetics(Candidates(step.query, similarity, step.queue, masked, step.generator))


def mixing_draws(seed: int, step: int, rank: int = 0) -> torch.Generator:
    return generator("mix negatives", seed, step, rank)


@pytest.mark.parametrize("through_query", [False, True])
def test_a_step_equals_the_papers_algorithm(through_query: bool) -> None:
    negatives = {**MOCHI, "through_query": through_query}
    moco = MoCo(ENCODER, recipe(negatives=negatives), seed=5)
    with torch.no_grad():
        for parameter in moco.momentum_encoder.parameters():
            parameter.add_(0.1)
    before = copy.deepcopy(moco)
    step = moco.training_step(images(0), images(1), LABELS, step=3, synthesize=True)
    step.loss.loss.backward()

    query = F.normalize(before.query_encoder(images(0)), dim=-1)
    torch.testing.assert_close(step.query, query)
    for key_parameter, query_parameter in zip(
        before.momentum_encoder.parameters(), before.query_encoder.parameters(), strict=True
    ):
        key_parameter.data = 0.9 * key_parameter.data + 0.1 * query_parameter.data
    for ours, expected in zip(
        moco.momentum_encoder.parameters(), before.momentum_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    order = torch.randperm(8, generator=generator("shuffle keys", 5, 3))
    key = torch.empty(8, 6)
    key[order] = F.normalize(before.momentum_encoder(images(1)[order]), dim=-1).detach()
    torch.testing.assert_close(step.key, key)

    queue = before.queue.keys
    pairs, mixes = expected_synthetics(step, mixing_draws(5, 3))
    # The synthetic is the direction of b q + (1 - b) n, whatever its length.
    mixed = synthetic_vectors(query if through_query else query.detach(), queue, mixes)
    vectors = [synthetic_vectors(query.detach(), queue, pairs), F.normalize(mixed, dim=-1)]
    double = [tensor.double() for tensor in (query, key, queue)]
    expected_loss = mochi_loss(*double, 0.2, [each.double() for each in vectors])
    expected_loss.backward()
    torch.testing.assert_close(step.loss.loss.double(), expected_loss, rtol=1e-5, atol=0)
    for ours, expected in zip(
        moco.query_encoder.parameters(), before.query_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5)

    # The queue is the one that the loss used, until `enqueue` adds the keys of this step.
    assert torch.equal(moco.queue.keys, before.queue.keys)
    moco.enqueue(step.key, LABELS)
    assert torch.equal(moco.queue.keys[:8], step.key)
    assert torch.equal(moco.queue.labels[:8], LABELS)


def test_ranks_draw_different_synthetics_but_the_same_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks have different queries, so equal draws would halve their variety; the shuffle is of the global
    batch.
    """
    moco, keys = MoCo(ENCODER, recipe(negatives=MOCHI), seed=5), []
    for rank in (0, 1, 2):
        monkeypatch.setattr("mochi.contrast.moco.rank", lambda rank=rank: rank)
        step = moco.training_step(images(0), images(1), LABELS, step=3, synthesize=True)
        step.generator.manual_seed(step.generator.initial_seed())
        for ours, expected in zip(
            synthetics_of(step), expected_synthetics(step, mixing_draws(5, 3, rank)), strict=True
        ):
            assert torch.equal(ours.parents, expected.parents)
            assert torch.equal(ours.weights, expected.weights)
        keys.append(moco._encode_keys(images(1), 3))
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[0], keys[2])


def test_keys_are_unshuffled() -> None:
    moco = MoCo(ENCODER, recipe(bn_groups=1), seed=0)
    batch = images(0)
    shuffled = [moco._encode_keys(batch, step) for step in (0, 1, 2)]
    for key in shuffled:  # one group: statistics do not depend on the order, so neither do keys
        torch.testing.assert_close(key, shuffled[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shuffled[0][0], shuffled[0][1], atol=1e-3)


def test_shuffling_moves_images_between_batch_norm_groups() -> None:
    """With several groups a key depends on the shuffle, so batch statistics cannot leak which key is the
    positive. With a single group, shuffling changes nothing.
    """
    for groups, moves in ((2, True), (1, False)):
        moco = MoCo(ENCODER, recipe(bn_groups=groups), seed=0)
        keys = [moco._encode_keys(images(0), step) for step in (0, 1)]
        assert torch.allclose(keys[0], keys[1], atol=1e-4) is not moves


def test_processes_must_divide_the_batch_norm_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are of the global batch: with more processes than groups there would be more groups."""
    for processes, groups in ((1, 6), (2, 3), (3, 2), (6, 1)):
        monkeypatch.setattr("mochi.contrast.moco.world_size", lambda processes=processes: processes)
        assert MoCo(ENCODER, recipe(bn_groups=6, batch_size=12), seed=0).backbone.bn1.num_groups == groups
    for processes in (4, 12):
        monkeypatch.setattr("mochi.contrast.moco.world_size", lambda processes=processes: processes)
        with pytest.raises(ConfigError, match=rf"found 6; {processes} processes .* out of 1, 2, 3, 6"):
            MoCo(ENCODER, recipe(bn_groups=6, batch_size=12), seed=0)


def test_features_of_lower_precision_are_normalised_in_float32() -> None:
    features = torch.randn(4, 6).bfloat16()
    torch.testing.assert_close(unit(features), F.normalize(features.double(), dim=1).float())


def test_the_momentum_update_changes_parameters_only() -> None:
    moco = MoCo(ENCODER, recipe(key_momentum=1.0), seed=0)
    before = copy.deepcopy(moco.momentum_encoder)
    moco.training_step(images(0), images(1), LABELS, step=0, synthesize=False)
    for (name, ours), theirs in zip(
        moco.momentum_encoder.named_parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert not ours.requires_grad
    assert not torch.equal(moco.backbone.bn1.running_mean, before.backbone.bn1.running_mean)


def test_there_are_no_synthetics_during_the_warmup() -> None:
    moco = MoCo(ENCODER, recipe(negatives=MOCHI), seed=0)
    assert not synthetics_of(moco.training_step(images(0), images(1), LABELS, step=0, synthesize=False))
    step = moco.training_step(images(0), images(1), LABELS, step=1, synthesize=True)
    pairs, mixes = synthetics_of(step)
    assert pairs.parents.shape == (8, 7, 2)
    assert mixes.parents.shape == (8, 3, 1)


def test_synthetics_never_enter_the_queue() -> None:
    moco = MoCo(ENCODER, recipe(negatives=MOCHI), seed=0)
    step = moco.training_step(images(0), images(1), LABELS, step=0, synthesize=True)
    moco.enqueue(step.key, LABELS)
    assert int(moco.queue.num_enqueued) == 8


def test_the_class_oracle_excludes_negatives_of_the_querys_class() -> None:
    moco = MoCo(ENCODER, recipe(negatives=MOCHI, masks=["class_oracle"]), seed=0)
    moco.queue.enqueue(F.normalize(torch.randn(20, 6), dim=-1), torch.arange(20) % 3)
    step = moco.training_step(images(0), images(1), LABELS, step=0, synthesize=True)
    excluded = LABELS[:, None] == step.queue_labels
    assert torch.equal(step.excluded, excluded)
    masked = (step.query @ step.queue.T).masked_fill(excluded, -torch.inf)
    for synthetic in synthetics_of(step):
        assert not excluded.gather(1, synthetic.parents.flatten(1)).any()
    torch.testing.assert_close(step.loss.hardest_negative, masked.amax(1))


def test_older_keys_of_the_querys_own_image_are_excluded_by_their_index() -> None:
    moco = MoCo(ENCODER, recipe(negatives=MOCHI, masks=["same_image"]), seed=0)
    first = moco.training_step(
        images(0), images(1), LABELS, step=0, synthesize=True, images=torch.arange(8)
    )
    assert not first.excluded.any()
    moco.enqueue(first.key, LABELS, torch.arange(8))
    shuffled = torch.tensor([3, 9, 0, 11, 12, 13, 14, 7])
    step = moco.training_step(images(0), images(1), LABELS, step=1, synthesize=True, images=shuffled)
    assert step.excluded.nonzero().tolist() == [[0, 3], [2, 0], [7, 7]]
    for synthetic in synthetics_of(step):
        assert not step.excluded.gather(1, synthetic.parents.flatten(1)).any()
    masked = (step.query @ step.queue.T).masked_fill(step.excluded, -torch.inf)
    torch.testing.assert_close(step.loss.hardest_negative, masked.amax(1))


def test_keys_of_unknown_images_are_kept() -> None:
    """An index that stands for "unknown" equals that of no image, wherever it was left out."""
    moco = MoCo(ENCODER, recipe(masks=["same_image"]), seed=0)
    for known in (None, torch.arange(8), None):
        step = moco.training_step(images(0), images(1), LABELS, step=0, synthesize=False, images=known)
        assert not step.excluded.any()
        moco.enqueue(step.key, LABELS, known)


def test_the_class_oracle_keeps_negatives_without_a_label() -> None:
    """A new queue has no labels, and neither has an unlabelled image."""
    moco = MoCo(ENCODER, recipe(masks=["class_oracle"]), seed=0)
    labels = torch.tensor([-1, 0, -1, 1, -1, 2, -1, 0])
    step = moco.training_step(images(0), images(1), labels, step=0, synthesize=False)
    torch.testing.assert_close(step.loss.hardest_negative, (step.query @ step.queue.T).amax(1))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_equal_seeds_and_steps_give_equal_results(head: str) -> None:
    def losses(seed: int, step: int) -> torch.Tensor:
        moco = MoCo(ENCODER, recipe(negatives=MOCHI, head=head), seed=seed)
        return moco.training_step(images(0), images(1), LABELS, step=step, synthesize=True).loss.loss

    assert torch.equal(losses(0, 0), losses(0, 0))
    assert not torch.equal(losses(0, 0), losses(1, 0))
    assert not torch.equal(losses(0, 0), losses(0, 1))


def test_the_seed_decides_the_shuffles_too() -> None:
    """torch's CPU generator reads only the low 32 bits of a seed; the seed of the run must reach them."""
    moco = MoCo(ENCODER, recipe(), seed=0)
    other = copy.deepcopy(moco)
    other.seed = 1
    assert not torch.allclose(moco._encode_keys(images(1), 3), other._encode_keys(images(1), 3), atol=1e-4)


def test_weights_and_initial_queue_depend_on_the_seed_alone() -> None:
    """Whatever torch's own generator did before; the momentum encoder starts as a copy."""
    states = []
    for before, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(before)
        states.append(MoCo(ENCODER, recipe(), seed=seed).state_dict())
    one, again, other = states
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    for name in ("query_encoder.backbone.conv1.weight", "query_encoder.head.0.weight", "queue.keys"):
        assert not torch.equal(one[name], other[name]), name
    for name, value in one.items():
        if name.startswith("momentum_encoder."):
            assert torch.equal(value, one[name.replace("momentum_", "query_")]), name
