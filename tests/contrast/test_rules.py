"""Rules of negatives: the fused form compared with the simple form, the simple form with the papers'
formulas, degenerate inputs, masks, and how rules are found.
"""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mochi.contrast import rules
from mochi.contrast.key_queue import KeyQueue
from mochi.contrast.loss import chance_level, contrastive_loss
from mochi.contrast.negatives import SparseSynthetics, Synthetics, VectorSynthetics
from mochi.contrast.rules import Candidates, Mask, Rule
from mochi.contrast.rules.class_oracle import ClassOracle
from mochi.contrast.rules.debiased import Debiased
from mochi.contrast.rules.decoupled import Decoupled
from mochi.contrast.rules.hard_weighting import HardWeighting
from mochi.contrast.rules.mochi import MoCHi
from mochi.contrast.rules.moco import MoCo
from mochi.contrast.rules.same_image import SameImage
from mochi.contrast.rules.synco import SynCo
from tests.reference import mochi_loss, simple_form, synthetic_vectors

SYNCO = {
    "num_interpolated": 3, "num_extrapolated": 4, "num_mixed": 5, "num_noisy": 6, "num_perturbed": 7,
    "num_adversarial": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DebiasedMixes(Debiased, MoCHi):
    """MoCHi's synthetics under the debiased loss: M counts them too."""


@dataclass(frozen=True, kw_only=True)
class WeightedMixes(HardWeighting, MoCHi):
    """MoCHi's synthetics, weighted by how hard they are."""


@dataclass(frozen=True, kw_only=True)
class DecoupledMixes(Decoupled, MoCHi):
    """MoCHi's synthetics without the positive in the denominator."""


MIXES = {"num_hardest": 4, "num_pair_synthetics": 9, "num_query_synthetics": 7}
RULES: dict[str, Rule] = {
    "moco": MoCo(),
    "mochi": MoCHi(**MIXES),
    "through the query": MoCHi(
        num_hardest=4, num_pair_synthetics=0, num_query_synthetics=7, through_query=True
    ),
    "debiased": Debiased(positive_prior=0.02),
    "debiased, often at least": Debiased(positive_prior=0.3),
    "hard weighting": HardWeighting(positive_prior=0.02, concentration=1.0),
    "soft weighting": HardWeighting(positive_prior=0.1, concentration=0.3),
    "decoupled": Decoupled(),
    "synco": SynCo(num_hardest=4, **SYNCO),
    "debiased mixes": DebiasedMixes(positive_prior=0.02, **MIXES),
    "weighted mixes": WeightedMixes(positive_prior=0.02, concentration=0.5, **MIXES),
    "decoupled mixes": DecoupledMixes(**MIXES),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def batch(num: int, size: int, seed: int = 0, dim: int = 5, dtype: torch.dtype = torch.float64):
    """Raw queries, unit keys near them, and a queue."""
    draws = torch.Generator().manual_seed(seed)
    raw, noise, queue = (
        torch.randn(rows, dim, generator=draws, dtype=torch.float64) for rows in (num, num, size)
    )
    return raw.to(dtype), F.normalize(raw + noise, dim=-1).to(dtype), F.normalize(queue, dim=-1).to(dtype)


def loss_and_gradient(
    rule: Rule, raw: Tensor, key: Tensor, queue: Tensor, temperature: float, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    free = raw.clone().requires_grad_()
    draws = torch.Generator().manual_seed(7)
    query = F.normalize(free, dim=-1)
    loss = contrastive_loss(query, key, queue, temperature, rule, excluded, draws).loss
    loss.backward()
    assert free.grad is not None
    return loss.detach(), free.grad


@every_rule
@settings(max_examples=40)
@given(
    num=st.integers(1, 6),
    size=st.integers(4, 40),
    temperature=st.sampled_from([0.07, 0.2, 1.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_fused_equals_simple_in_float64(
    rule: Rule, num: int, size: int, temperature: float, masked: float, seed: int
) -> None:
    raw, key, queue = batch(num, size, seed)
    excluded = torch.rand(num, size, generator=torch.Generator().manual_seed(seed)) < masked
    for left_out in (None, excluded):
        fused = loss_and_gradient(rule, raw, key, queue, temperature, left_out)
        simple = loss_and_gradient(simple_form(rule), raw, key, queue, temperature, left_out)
        torch.testing.assert_close(fused[0], simple[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fused[1], simple[1], rtol=1e-12, atol=1e-12 / temperature)


@every_rule
def test_fused_equals_simple_in_float32(rule: Rule) -> None:
    """More columns than one block of weights has, and more queries than one block on a CPU."""
    raw, key, queue = batch(70, 5000, dim=32, dtype=torch.float32)
    fused = loss_and_gradient(rule, raw, key, queue, 0.2)
    simple = loss_and_gradient(simple_form(rule), raw, key, queue, 0.2)
    torch.testing.assert_close(fused[0], simple[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(fused[1], simple[1], rtol=1e-5, atol=1e-5 * simple[1].abs().max().item())


@pytest.mark.parametrize("name", ["moco", "through the query", "debiased", "soft weighting", "decoupled"])
def test_gradcheck(name: str) -> None:
    """For losses that detach nothing; the tests of the loss check the others."""
    raw, key, queue = batch(2, 9, seed=3)

    def loss(free: Tensor) -> Tensor:
        draws = torch.Generator().manual_seed(7)
        query = F.normalize(free, dim=-1)
        return contrastive_loss(query, key, queue, 0.2, RULES[name], generator=draws).loss

    assert torch.autograd.gradcheck(loss, (raw.requires_grad_(),))


def from_the_paper(rule: Rule, query: Tensor, key: Tensor, queue: Tensor, t: float) -> Tensor:
    """The losses as in the authors' public code, on the same logits."""
    pos, neg = ((query * key).sum(-1) / t).exp(), (query @ queue.T / t).exp()
    num = len(queue)
    if isinstance(rule, Decoupled):
        return (-pos.log() + neg.sum(-1).log()).mean()
    assert isinstance(rule, Debiased)
    total = neg.sum(-1)
    if isinstance(rule, HardWeighting):
        importance = (rule.concentration * neg.log()).exp()
        total = (importance * neg).sum(-1) / importance.mean(-1)
    estimate = (-rule.positive_prior * num * pos + total) / (1 - rule.positive_prior)
    estimate = torch.clamp(estimate, min=num * math.exp(-1 / t))
    return (-torch.log(pos / (pos + estimate))).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize(
    "name", ["debiased", "debiased, often at least", "hard weighting", "soft weighting", "decoupled"]
)
def test_equals_the_papers_formula(name: str, temperature: float) -> None:
    rule, (raw, key, queue) = RULES[name], batch(70, 50)
    free = raw.clone().requires_grad_()
    expected = from_the_paper(rule, F.normalize(free, dim=-1), key, queue, temperature)
    expected.backward()
    loss, gradient = loss_and_gradient(rule, raw, key, queue, temperature)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, free.grad, rtol=1e-11, atol=1e-13)


def test_some_debiased_estimates_are_clamped_and_some_are_not() -> None:
    """Otherwise the tests above would not cover both branches."""
    raw, key, queue = batch(70, 50)
    query = F.normalize(raw, dim=-1)
    positive, similarity = (query * key).sum(-1), query @ queue.T
    for name, low, high in (("debiased", 0.0, 0.4), ("debiased, often at least", 0.5, 1.0)):
        (share,) = RULES[name].measure(positive, similarity, 0.1).values()
        assert low < share.mean() < high


def test_effective_negatives_are_between_one_and_all() -> None:
    """With equal similarities all negatives count; with a small temperature only the hardest."""
    rule = HardWeighting()
    equal = rule.measure(torch.ones(2), torch.zeros(2, 8), 0.2)["effective_negatives"]
    torch.testing.assert_close(equal, torch.full((2,), 8.0))
    sharp = rule.measure(torch.ones(1), torch.linspace(0, 1, 8)[None], 0.01)["effective_negatives"]
    torch.testing.assert_close(sharp, torch.ones(1), rtol=1e-4, atol=0)


@every_rule
def test_a_query_without_negatives_has_neither_loss_nor_gradient(rule: Rule) -> None:
    """And other queries do not change, in either form."""
    raw, key, queue = batch(3, 12)
    excluded = torch.zeros(3, 12, dtype=torch.bool)
    excluded[1] = True
    for each in (rule, simple_form(rule)):
        loss, gradient = loss_and_gradient(each, raw, key, queue, 0.2, excluded)
        assert math.isfinite(loss.item())
        assert gradient.isfinite().all()
        assert not gradient[1].any()
        assert gradient[0].any()
        nothing, none = loss_and_gradient(each, raw, key, queue, 0.2, torch.ones_like(excluded))
        assert nothing.item() == 0
        assert not none.any()


@every_rule
def test_both_forms_report_the_same_similarities(rule: Rule) -> None:
    """Also of a query without negatives: none is its hardest."""
    raw, key, queue = batch(3, 12)
    query = F.normalize(raw, dim=-1)
    excluded = torch.zeros(3, 12, dtype=torch.bool)
    excluded[1], excluded[2, ::2] = True, True
    fused, simple = (
        contrastive_loss(query, key, queue, 0.2, each, excluded, torch.Generator().manual_seed(7))
        for each in (rule, simple_form(rule))
    )
    similarity = (query @ queue.T).masked_fill(excluded, -torch.inf)
    assert torch.equal(
        fused.hardest_synthetic.isneginf()[[0, 2]], torch.tensor([not rule.num_synthetics] * 2)
    )
    for each in (fused, simple):
        torch.testing.assert_close(each.positive, (query * key).sum(1))
        torch.testing.assert_close(each.hardest_negative, similarity.amax(1))
        torch.testing.assert_close(each.hardest_synthetic[[0, 2]], fused.hardest_synthetic[[0, 2]])


@every_rule
def test_the_values_of_excluded_negatives_do_not_matter(rule: Rule) -> None:
    raw, key, queue = batch(3, 12)
    excluded = torch.zeros(3, 12, dtype=torch.bool)
    excluded[:, [2, 5, 11]] = True
    other = queue.clone()
    other[[2, 5, 11]] = -F.normalize(raw, dim=-1)
    one = loss_and_gradient(rule, raw, key, queue, 0.2, excluded)
    two = loss_and_gradient(rule, raw, key, other, 0.2, excluded)
    torch.testing.assert_close(one[0], two[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one[1], two[1], rtol=1e-11, atol=1e-11)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_stay_finite(rule: Rule, dtype: torch.dtype) -> None:
    """Temperature 0.02; all vectors equal; key and negatives on opposite sides, or negatives on both; a
    queue of fewer rows than the batch."""
    raw, key, queue = batch(7, 5, dtype=dtype)
    same = raw[:1].expand(7, 5)
    unit_same = F.normalize(same, dim=-1)
    for inputs in (
        (raw, key, queue),
        (same, unit_same, unit_same[:5]),
        (same, unit_same, -unit_same[:5]),
        (same, -unit_same, unit_same[:5]),
        (same, -unit_same, torch.cat((unit_same[:2], -unit_same[:3]))),
    ):
        for each in (rule, simple_form(rule)):
            loss, gradient = loss_and_gradient(each, *inputs, 0.02)
            assert loss.isfinite()
            assert gradient.isfinite().all()


@every_rule
def test_nan_in_gives_nan_out(rule: Rule) -> None:
    for index in range(3):
        inputs = [each.clone() for each in batch(3, 12)]
        inputs[index][1] = torch.nan
        for each in (rule, simple_form(rule)):
            assert loss_and_gradient(each, *inputs, 0.2)[0].isnan()


@every_rule
def test_chance_is_the_loss_of_equal_similarities(rule: Rule) -> None:
    expected = math.log(12 + rule.num_synthetics + (not isinstance(rule, Decoupled)))
    assert chance_level(rule, 12, 0.2) == pytest.approx(expected, rel=1e-14)
    if not rule.num_synthetics:  # after mixing they are closer to the query
        row = F.normalize(torch.ones(1, 4, dtype=torch.float64), dim=-1)
        loss = contrastive_loss(row, row, row.expand(12, 4), 0.2, rule).loss
        assert loss.item() == pytest.approx(expected, rel=1e-14)


@every_rule
def test_num_synthetics_is_the_number_of_synthetics(rule: Rule) -> None:
    raw, _, queue = batch(3, 12)
    query = F.normalize(raw, dim=-1)
    synthetics = rule.synthetics(Candidates(query, query @ queue.T, queue, False, None))
    assert sum(each.parents.shape[1] for each in synthetics) == rule.num_synthetics


@every_rule
def test_no_synthetic_has_an_excluded_parent(rule: Rule) -> None:
    """Two negatives are left, fewer than the pool would have."""
    raw, _, queue = batch(3, 12)
    query = F.normalize(raw, dim=-1)
    excluded = torch.ones(3, 12, dtype=torch.bool)
    excluded[:, [4, 7]] = False
    similarity = (query @ queue.T).masked_fill(excluded, -torch.inf)
    for each in rule.synthetics(Candidates(query, similarity, queue, True, None)):
        assert set(each.parents.flatten().tolist()) == {4, 7}


def test_without_a_prior_the_debiased_loss_is_mocos() -> None:
    raw, key, queue = batch(3, 12)
    found = loss_and_gradient(Debiased(positive_prior=0), raw, key, queue, 0.2)
    expected = loss_and_gradient(MoCo(), raw, key, queue, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_warmup() -> None:
    rule = HardWeighting(warmup_epochs=2)
    assert [rule.is_active(epoch) for epoch in range(4)] == [False, False, True, True]
    assert MoCo().is_active(0)


# ---------------------------------------------------------------- SynCo


def synco_types(**changes: Any) -> tuple[Tensor, Tensor, list[Synthetics]]:
    """Queries, queue and 200 synthetics of each type."""
    raw, _, queue = batch(2, 12)
    query = F.normalize(raw, dim=-1)
    numbers = {**dict.fromkeys(SYNCO, 200), "num_hardest": 4, **changes}
    draws = torch.Generator().manual_seed(0)
    rule = SynCo(**numbers)
    return query, queue, rule.synthetics(Candidates(query, query @ queue.T, queue, False, draws))


def test_synco_sums_of_query_and_negative() -> None:
    """Types 1, 2 and 5: the share of q covers its range, and vectors have length 1."""
    query, queue, synthetics = synco_types(perturbation=0.3)
    ranges = {0: (0.0, 0.5), 1: (-0.5, 0.0), 4: (0.3 / 1.3, 0.3 / 1.3)}
    for kind, (low, high) in ranges.items():
        each = synthetics[kind]
        assert isinstance(each, SparseSynthetics)
        assert each.query_weight is not None
        weight = each.weights[..., 0]
        share = each.query_weight / (each.query_weight + weight)
        assert low - 1e-12 <= share.min() <= low + 0.02
        assert high - 0.02 <= share.max() <= high + 1e-12
        vectors = (
            each.query_weight[..., None] * query[:, None] + weight[..., None] * queue[each.parents[..., 0]]
        )
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 200, dtype=torch.float64))
        found = each.similarity(query, query @ queue.T)
        torch.testing.assert_close(found, torch.einsum("bc,bsc->bs", query, vectors))


def test_synco_mixes_are_constants_for_the_gradient() -> None:
    """Against autograd through vectors that were made before."""
    raw, key, queue = batch(5, 12)
    rule = RULES["synco"]
    free = raw.clone().requires_grad_()
    query = F.normalize(free, dim=-1)
    start, draws = query.detach(), torch.Generator().manual_seed(7)
    synthetics = rule.synthetics(Candidates(start, start @ queue.T, queue, False, draws))
    expected = mochi_loss(
        query, key, queue, 0.2, [synthetic_vectors(start, queue, each) for each in synthetics]
    )
    expected.backward()
    loss, gradient = loss_and_gradient(rule, raw, key, queue, 0.2)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, free.grad, rtol=1e-11, atol=1e-14)


def test_synco_pairs_equal_mochis() -> None:
    _, _, synthetics = synco_types()
    assert synthetics[2].parents.shape == (2, 200, 2)
    assert (synthetics[2].parents[..., 0] != synthetics[2].parents[..., 1]).all()


def test_synco_vectors() -> None:
    """Type 4: normal noise of the given size on each coordinate. Type 6: a step along the sign of q."""
    query, queue, synthetics = synco_types(noise=0.01, adversarial_step=0.1, num_noisy=5000)
    noisy, adversarial = synthetics[3], synthetics[5]
    assert isinstance(noisy, VectorSynthetics)
    assert isinstance(adversarial, VectorSynthetics)
    parents = queue[adversarial.parents[..., 0]]
    expected = F.normalize(parents + 0.1 * query.sign()[:, None], dim=-1)
    torch.testing.assert_close(adversarial.vectors, expected)
    noise = noisy.vectors - queue[noisy.parents[..., 0]]
    # The component along the parent is removed by the normalisation.
    along = (noise * queue[noisy.parents[..., 0]]).sum(-1, keepdim=True) * queue[noisy.parents[..., 0]]
    assert (noise - along).square().sum(-1).mean().sqrt() == pytest.approx(0.01 * (5 - 1) ** 0.5, rel=0.02)
    for each in (noisy, adversarial):
        found = each.similarity(query, query @ queue.T)
        torch.testing.assert_close(found, torch.einsum("bc,bsc->bs", query, each.vectors))


def test_each_count_of_synco_is_of_its_type() -> None:
    raw, _, queue = batch(2, 12)
    query = F.normalize(raw, dim=-1)
    candidates = Candidates(query, query @ queue.T, queue, False, None)
    for number, name in enumerate(SYNCO):
        rule = SynCo(num_hardest=4, **{**dict.fromkeys(SYNCO, 0), name: 3})
        (synthetics,) = rule.synthetics(candidates)
        assert synthetics.parents.shape == (2, 3, 2 if number == 2 else 1)
        assert isinstance(synthetics, VectorSynthetics) == (name in {"num_noisy", "num_adversarial"})
        assert rule.makes_vectors == isinstance(synthetics, VectorSynthetics)


# ---------------------------------------------------------------- masks


def filled_queue() -> KeyQueue:
    queue = KeyQueue(6, 3)
    queue.enqueue(torch.eye(3), torch.tensor([0, 1, -1]), torch.tensor([10, 11, 12]))
    queue.enqueue(torch.eye(3)[:2], torch.tensor([0, 2]))
    return queue


def test_masks_exclude_equal_known_labels_and_images() -> None:
    queue = filled_queue()
    labels, images = torch.tensor([0, -1, 2]), torch.tensor([11, 12, -1])
    of_class = ClassOracle().excluded(labels, images, queue).nonzero().tolist()
    assert of_class == [[0, 0], [0, 3], [2, 4]]
    of_image = SameImage().excluded(labels, images, queue).nonzero().tolist()
    assert of_image == [[0, 1], [1, 2]]
    both = rules.exclude([ClassOracle(), SameImage()], labels, images, queue)
    assert both is not None
    assert both.nonzero().tolist() == sorted(of_class + of_image)
    assert rules.exclude([], labels, images, queue) is None


# ---------------------------------------------------------------- discovery


def test_rules_and_masks_are_found_without_torch() -> None:
    """Commands that read an experiment file must not wait for torch."""
    code = (
        "import sys; from mochi.contrast import rules; "
        "print(*[f'{name}={rules.find(name).__name__}' for name in sys.argv[1:]]); "
        "assert 'torch' not in sys.modules"
    )
    expected = {
        "class_oracle": "ClassOracle", "debiased": "Debiased", "decoupled": "Decoupled",
        "hard_weighting": "HardWeighting", "mochi": "MoCHi", "moco": "MoCo", "same_image": "SameImage",
        "synco": "SynCo",
    }  # fmt: skip
    assert set(rules.names()) >= set(expected)
    command = [sys.executable, "-c", code, *expected]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{name}={kind}" for name, kind in expected.items()]
    assert set(rules.names()) == {*rules.names_of(Rule), *rules.names_of(Mask)}
    assert not set(rules.names_of(Rule)) & set(rules.names_of(Mask))


@pytest.mark.parametrize("text", ["", "from mochi.contrast.rules.moco import MoCo\n", "A, B = 1, 2\n"])
def test_a_file_without_a_rule_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"empty_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    assert name in rules.names()
    with pytest.raises(
        ValueError, match=rf"{name}\.py: found none; expected one subclass of Rule or of Mask"
    ):
        rules.find(name)


class Squared(MoCo):
    """A subclass of a fused rule that replaces the loss."""

    def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
        return super().loss(positive, similarity, temperature) ** 2


class Mean(Rule):
    def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
        return (similarity.mean(1) - positive).mean()


def test_a_subclass_that_replaces_only_the_loss_is_not_fused() -> None:
    assert MoCo().is_fused
    assert RULES["mochi"].is_fused
    assert not Squared().is_fused
    assert not Rule().is_fused
    raw, key, queue = batch(1, 9)
    plain = loss_and_gradient(MoCo(), raw, key, queue, 0.2)[0]
    torch.testing.assert_close(loss_and_gradient(Squared(), raw, key, queue, 0.2)[0], plain**2)


def test_a_loss_that_is_not_per_query_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Mean\.loss: found shape \(\); expected \(3,\), the loss of each"
    ):
        loss_and_gradient(Mean(), *batch(3, 9), 0.2)


def test_a_simple_rule_needs_memory_for_one_block_of_queries() -> None:
    """A CPU differentiates 64 queries at a time."""
    seen = []

    class Counted(MoCo):
        def loss(self, positive: Tensor, similarity: Tensor, temperature: float) -> Tensor:
            seen.append(len(positive))
            return super().loss(positive, similarity, temperature)

    loss_and_gradient(Counted(), *batch(150, 9), 0.2)
    assert seen == [64, 64, 22]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoCo(warmup_epochs=-1), "warmup_epochs: found -1; expected at least 0"),
        (lambda: Debiased(warmup_epochs=-1), "warmup_epochs: found -1; expected at least 0"),
        (lambda: Debiased(positive_prior=-0.1), "positive_prior: found -0.1; expected 0 or more"),
        (lambda: Debiased(positive_prior=1.0), "positive_prior: found 1.0; expected 0 or more and below 1"),
        (lambda: Debiased(positive_prior=math.nan), "positive_prior: found nan"),
        (lambda: HardWeighting(warmup_epochs=-1), "warmup_epochs: found -1; expected at least 0"),
        (lambda: HardWeighting(concentration=math.inf), "concentration: found inf"),
        (lambda: HardWeighting(concentration=0), "concentration: found 0; expected more than 0"),
        (lambda: SynCo(**dict.fromkeys(SYNCO, 0)), "found all 0, which is plain MoCo"),
        (lambda: SynCo(num_noisy=-1), "num_noisy: found -1; expected at least 0"),
        (lambda: SynCo(noise=0), "noise: found 0; expected a number above 0"),
        (lambda: SynCo(noise=math.inf), "noise: found inf; expected a number above 0"),
        (lambda: SynCo(noise="0.1"), r"noise: found '0\.1' \(str\); expected a number"),
        (lambda: SynCo(num_noisy=8.0), r"num_noisy: found 8\.0 \(float\); expected a whole number"),
        (lambda: MoCo(warmup_epochs=True), r"warmup_epochs: found True \(bool\); expected a whole number"),
        (
            lambda: MoCHi(num_hardest=4, num_pair_synthetics=2, num_query_synthetics=0, through_query="no"),
            r"through_query: found 'no' \(str\); expected True or False",
        ),
        (lambda: MoCHi(**{**MIXES, "num_hardest": 1}).check(9), "found 1; expected 2 to 9 .* two of them$"),
        (
            lambda: MoCHi(num_hardest=0, num_pair_synthetics=0, num_query_synthetics=2).check(9),
            r"num_hardest: found 0; expected 1 to 9 \(queue_size\): they are keys of the queue$",
        ),
        (lambda: SynCo(num_hardest=1).check(9), "num_hardest: found 1; expected 2 to 9"),
        (lambda: SynCo(num_hardest=0, num_mixed=0).check(9), "num_hardest: found 0; expected 1 to 9"),
        (lambda: SynCo().check(512), r"num_hardest: found 1024; expected 2 to 512 \(queue_size\)"),
        (
            lambda: MoCHi(num_hardest=4, num_pair_synthetics=0, num_query_synthetics=0),
            "found 0 and 0, which is plain MoCo",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pool_of_one_is_enough_for_query_mixes_and_a_pool_may_be_the_queue() -> None:
    MoCHi(num_hardest=1, num_pair_synthetics=0, num_query_synthetics=2).check(9)
    MoCHi(**{**MIXES, "num_hardest": 9}).check(9)
    SynCo(num_hardest=1, num_mixed=0).check(9)


def test_defaults_are_those_of_the_public_code() -> None:
    """giakoumoglou/synco, chingyaoc/DCL (STL-10) and joshr17/HCL."""
    assert SynCo() == SynCo(
        warmup_epochs=10, num_hardest=1024, num_interpolated=256, num_extrapolated=256, num_mixed=256,
        num_noisy=64, num_perturbed=64, num_adversarial=64, noise=0.01, perturbation=0.01,
        adversarial_step=0.01,
    )  # fmt: skip
    assert Debiased() == Debiased(warmup_epochs=0, positive_prior=0.1)
    assert HardWeighting() == HardWeighting(warmup_epochs=0, positive_prior=0.1, concentration=1.0)
