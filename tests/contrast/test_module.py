"""MoCHiLoss compared with a pretraining step bit by bit, with loops in float64, and used as a module."""

import copy
import os
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mochi import ContrastiveLoss, KeyQueue, MoCHiLoss, contrastive_loss
from mochi.config import Contrastive, Encoder
from mochi.contrast.moco import MoCo
from mochi.contrast.negatives import Synthetics, hardest, mix_pairs, mix_with_query
from mochi.contrast.rules.hard_weighting import HardWeighting
from mochi.contrast.rules.same_image import SameImage
from mochi.errors import UserError
from mochi.runtime.distributed import own_slice, rank
from mochi.runtime.seeding import generator
from tests.processes import run_ranks
from tests.reference import Given, mixed_pair, mixed_with_query, mochi_loss
from tests.simulated_gpu import simulated_gpu

SETTINGS: dict[str, Any] = {
    "queue_size": 24, "dim": 5, "temperature": 0.2, "num_hardest": 6, "num_pair_synthetics": 8,
    "num_query_synthetics": 4,
}  # fmt: skip
PLAIN = {"num_hardest": 0, "num_pair_synthetics": 0, "num_query_synthetics": 0}


def criterion(**changes: Any) -> MoCHiLoss:
    return MoCHiLoss(**{**SETTINGS, "seed": 3, **changes})


def embeddings(seed: int, num: int = 4, dim: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    "mixing",
    [
        {"num_pair_synthetics": 7, "num_query_synthetics": 3},
        {"num_pair_synthetics": 7, "num_query_synthetics": 0},
        {"num_pair_synthetics": 0, "num_query_synthetics": 3, "through_query": True},
        None,
    ],
    ids=["mochi", "pairs", "through the query", "moco"],
)
def test_four_steps_are_bit_identical_to_pretraining(mixing: dict[str, Any] | None) -> None:
    recipe = Contrastive.model_validate({
        "objective": "contrastive", "epochs": 2, "batch_size": 8, "lr": 0.1, "momentum": 0.9,
        "weight_decay": 1e-4, "schedule": "cosine", "head": "mlp", "embedding_dim": 6, "queue_size": 20,
        "temperature": 0.2, "key_momentum": 0.9, "bn_groups": 2,
        "negatives": {"rule": "mochi", "num_hardest": 5, **mixing} if mixing else {"rule": "moco"},
    })  # fmt: skip
    moco = MoCo(Encoder(architecture="resnet10", stem="half", width=4), recipe, seed=5)
    numbers = {**PLAIN, **({"num_hardest": 5, **mixing} if mixing else {})}
    loss = MoCHiLoss(queue_size=20, dim=6, temperature=0.2, seed=5, **numbers)
    loss.queue.load_state_dict(moco.queue.state_dict())
    raw: dict[str, Tensor] = {}
    moco.query_encoder.register_forward_hook(lambda _, __, output: raw.update(query=output))
    moco.momentum_encoder.register_forward_hook(lambda _, __, output: raw.update(key=output))
    labels = torch.zeros(8, dtype=torch.long)
    for number in range(4):
        images = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        step = moco.training_step(images[0], images[1], labels, number, synthesize=True)
        raw["query"].retain_grad()
        step.loss.loss.backward()
        query = raw["query"].detach().requires_grad_()
        shuffle = torch.randperm(8, generator=generator("shuffle keys", 5, number))
        found = loss(query, raw["key"][shuffle.argsort()])
        found.backward()
        assert torch.equal(found, step.loss.loss)
        assert torch.equal(query.grad, raw["query"].grad)
        moco.enqueue(step.key, labels)
        assert torch.equal(loss.queue.keys, moco.queue.keys)


def loss_in_loops(query: Tensor, key: Tensor, queue: Tensor, step: int, seed: int = 3) -> Tensor:
    """MoCHi sections 3.2 and 3.3 in loops, every synthetic a vector; the draws are those of the module."""
    num, size = len(query), SETTINGS["num_hardest"]
    rng = generator("mix negatives", seed, step, 0)

    def uniform(columns: int) -> Tensor:
        return torch.rand(num, columns, generator=rng, dtype=torch.float64)

    first, shift, share = (uniform(SETTINGS["num_pair_synthetics"]) for _ in range(3))
    pool_index, query_share = (uniform(SETTINGS["num_query_synthetics"]) for _ in range(2))
    similarity = query.detach() @ queue.T
    order = hardest(similarity, size).columns  # draws are indices into it
    pairs, mixes = [], []
    for i in range(num):
        q, pool = query[i].detach(), order[i].tolist()
        assert set(pool) == set(similarity[i].argsort()[-size:].tolist())
        for j in range(first.shape[1]):
            a = int(first[i, j] * size)
            b = (a + 1 + int(shift[i, j] * (size - 1))) % size
            pairs.append(mixed_pair(queue[pool[a]], queue[pool[b]], float(share[i, j])))
        for j in range(pool_index.shape[1]):
            negative = queue[pool[int(pool_index[i, j] * size)]]
            mixes.append(mixed_with_query(q, negative, 0.5 * float(query_share[i, j])))
    vectors = [torch.stack(each).unflatten(0, (num, -1)) for each in (pairs, mixes)]
    return mochi_loss(query, key, queue, SETTINGS["temperature"], vectors)


def test_ten_steps_equal_the_equations_in_float64() -> None:
    loss = criterion().double()
    loss.queue.keys.copy_(F.normalize(loss.queue.keys, dim=-1))  # unit length in float32 precision
    rows = deque(loss.queue.keys.clone(), maxlen=24)
    encoder = nn.Linear(7, 5).double()
    encoder.weight.data = embeddings(0, 5, 7, torch.float64)
    other = copy.deepcopy(encoder)
    for step in range(10):
        images, views = (embeddings(seed + step, 5, 7, torch.float64) for seed in (10, 50))
        key = encoder(views).detach()
        found = loss(encoder(images), key)
        key = F.normalize(key, dim=-1)
        # New rows replace the oldest in place; a deque would move all of them.
        ring = torch.stack(list(rows)).roll(5 * step % 24, 0)
        expected = loss_in_loops(F.normalize(other(images), dim=-1), key, ring, step)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for model, value in ((encoder, found), (other, expected)):
            model.zero_grad()
            value.backward()
        torch.testing.assert_close(encoder.weight.grad, other.weight.grad, rtol=1e-10, atol=1e-13)
        for model in (encoder, other):
            model.weight.data -= 0.1 * encoder.weight.grad
        rows.extend(key)
    assert int(loss.queue.num_enqueued) == 50


def test_the_loss_sees_the_queue_before_its_keys_enter_it() -> None:
    loss = criterion(**PLAIN, queue_size=6)
    query, key = embeddings(0), embeddings(1)
    before = loss.queue.keys.clone()
    unit_key = F.normalize(key, dim=-1)
    assert torch.equal(
        loss(query, key), contrastive_loss(F.normalize(query, dim=-1), unit_key, before, 0.2).loss
    )
    assert torch.equal(loss.queue.keys, torch.cat([unit_key, before[4:]]))
    loss(query, embeddings(2))
    later = F.normalize(embeddings(2), dim=-1)
    assert torch.equal(loss.queue.keys, torch.cat([later[2:], unit_key[2:], later[:2]]))
    assert loss.queue.labels.eq(-1).all()


def test_keys_enter_the_queue_in_training_mode_or_by_enqueue() -> None:
    loss = criterion()
    before = loss.queue.keys.clone()
    loss(embeddings(0), embeddings(1), enqueue=False)
    loss.eval()
    first, second = loss(embeddings(0), embeddings(1)), loss(embeddings(0), embeddings(1))
    assert torch.equal(first, second)
    assert torch.equal(loss.queue.keys, before)
    loss.enqueue(embeddings(1))
    assert torch.equal(loss.queue.keys[:4], F.normalize(embeddings(1), dim=-1))
    assert int(loss.queue.num_enqueued) == 4


def test_a_restored_state_continues_equally(tmp_path: Path) -> None:
    loss = criterion()
    for step in range(3):
        loss(embeddings(step), embeddings(100 + step))
    torch.save(loss.state_dict(), tmp_path / "state.pt")
    restored = criterion()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        query, key = embeddings(step), embeddings(100 + step)
        assert torch.equal(loss(query, key), restored(query, key))
    assert torch.equal(loss.queue.keys, restored.queue.keys)


def test_the_seed_decides_the_draws_and_the_initial_queue() -> None:
    query, key = embeddings(0), embeddings(1)
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(losses))
        loss = criterion(seed=seed)
        losses.append([loss(query, key).item(), loss(query, key).item()])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]
    assert not torch.equal(criterion(seed=3).queue.keys, criterion(seed=4).queue.keys)
    one = criterion(seed=3)
    one.load_state_dict(criterion(seed=4).state_dict())
    assert not torch.equal(one(query, key), criterion(seed=4)(query, key)), (
        "the draws do not depend on the seed"
    )


def test_without_a_seed_draws_come_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    first_rows = criterion(seed=None).queue.keys
    assert torch.equal(state, torch.get_rng_state())
    found = []
    for seed in (0, 0, 1):
        loss = criterion(seed=None)
        assert torch.equal(loss.queue.keys, first_rows)
        torch.manual_seed(seed)
        found.append(loss(embeddings(0), embeddings(1)).item())
    assert found[0] == found[1] != found[2]


def test_autocast_does_not_change_the_loss() -> None:
    found = []
    for enabled in (False, True):
        query = embeddings(0).requires_grad_()
        loss = criterion()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(query, embeddings(1))
        value.backward()
        found.append((value, query.grad, loss.queue.keys))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_half_precision_embeddings_are_computed_in_float32() -> None:
    loss = criterion(temperature=0.02)
    query = embeddings(0).bfloat16().requires_grad_()
    value = loss(query, embeddings(0).bfloat16())
    value.backward()
    assert value.dtype == loss.queue.keys.dtype == torch.float32
    assert query.grad is not None
    assert query.grad.isfinite().all()
    torch.testing.assert_close(loss.queue.keys[:4].norm(dim=-1), torch.ones(4))


def test_gradcheck() -> None:
    """Through the normalisation, and through the query in a synthetic, with nothing detached."""
    loss = criterion(through_query=True, dim=3).double().eval()
    query = embeddings(0, 2, 3, torch.float64).requires_grad_()
    key = embeddings(1, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda free: loss(free, key), (query,))


def test_during_the_warmup_the_loss_is_mocos() -> None:
    query, key = embeddings(0), embeddings(1)
    plain = criterion(**PLAIN)(query, key)
    assert torch.equal(criterion()(query, key, synthesize=False), plain)
    assert criterion()(query, key) > plain


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_queue_is_on_the_default_device(device: str) -> None:
    with torch.device(device):
        queue = criterion().queue
    assert {each.device.type for each in queue.buffers()} == {device}


def test_keys_get_no_gradient() -> None:
    query, key = embeddings(0).requires_grad_(), embeddings(1).requires_grad_()
    criterion()(query, key).backward()
    assert query.grad is not None
    assert key.grad is None


def test_enqueued_keys_are_checked_and_keep_no_graph() -> None:
    loss = criterion()
    key = embeddings(1).requires_grad_()
    loss.enqueue(key * 2)
    assert not loss.queue.keys.requires_grad
    torch.testing.assert_close(loss.queue.keys[:4], F.normalize(key.detach(), dim=-1))
    with pytest.raises(UserError, match=r"key: found shape \(4, 6\); expected \(batch, 5\)"):
        loss.enqueue(embeddings(1, dim=6))


@pytest.mark.parametrize(("seed", "first"), [(3, 3), (0, 0), (None, 0)])
def test_the_queue_starts_with_unit_vectors_of_the_seed(seed: int | None, first: int) -> None:
    expected = KeyQueue(24, 5, generator("first rows of the queue", first)).keys
    assert torch.equal(criterion(seed=seed).queue.keys, expected)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize(("masks", "shown"), [([], ""), (["same_image"], "masks=[SameImage()], ")])
def test_the_module_prints_its_settings(masks: list[str], shown: str) -> None:
    loss = ContrastiveLoss(24, 5, 0.2, masks=masks, seed=3)
    rule = "MoCo(warmup_epochs=0)"
    assert loss.extra_repr() == f"queue_size=24, dim=5, temperature=0.2, rule={rule}, {shown}seed=3"


def test_a_batch_of_one_and_nan() -> None:
    loss = criterion()
    assert loss(embeddings(0, 1), embeddings(1, 1)).isfinite()
    broken = embeddings(0)
    broken[2, 1] = torch.nan
    assert criterion()(broken, embeddings(1)).isnan()
    assert criterion()(embeddings(1), broken).isnan()


def test_a_step_does_not_synchronise_with_the_gpu() -> None:
    loss = criterion()
    with simulated_gpu() as gpu:
        loss.to("cuda")
        query, key = embeddings(0).to("cuda").requires_grad_(), embeddings(1).to("cuda")
        gpu.waits.clear()
        loss(query, key).backward()
        assert not gpu.waits
        gpu.waits.clear()
        loss(query, key).item()
        assert gpu.waits, "the simulated GPU notices no wait"


def whole_batch(step: int) -> tuple[Tensor, Tensor]:
    return embeddings(step, 8, 7), embeddings(100 + step, 8, 7)


def encoder() -> nn.Module:
    model = nn.Linear(7, 5)
    model.weight.data, model.bias.data = embeddings(7, 5, 7), embeddings(8, 1, 5)[0]
    return model


def train_a_rank(folder: str, numbers: dict[str, int]) -> None:
    """As a user writes it: DDP around the model, the loss outside it."""
    torch.manual_seed(rank())  # ranks with different global seeds still have the same queue
    model, loss = DistributedDataParallel(encoder()), criterion(**numbers)
    losses = []
    for step in range(4):
        images, views = (own_slice(each) for each in whole_batch(step))
        with torch.no_grad():
            key = model.module(views)
        value = loss(model(images), key)
        model.zero_grad()
        value.backward()
        losses.append(value.detach())
    found = {"losses": losses, "gradient": model.module.weight.grad, "state": loss.state_dict()}
    torch.save(found, Path(folder) / f"{rank()}.pt")


@pytest.mark.parametrize("numbers", [PLAIN, {}], ids=["moco", "mochi"])
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path, numbers: dict[str, int]) -> None:
    run_ranks(train_a_rank, 2, str(tmp_path), numbers)
    ranks = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)]
    model, loss = encoder(), criterion(**numbers)
    for step in range(4):
        images, views = whole_batch(step)
        queue = loss.queue.keys.clone()
        if not numbers:  # each rank has its own draws
            expected = mean_loss_of_ranks(model, images, views, queue, step)
            loss.enqueue(model(views))
        else:
            expected = loss(model(images), model(views).detach())
        torch.testing.assert_close((ranks[0]["losses"][step] + ranks[1]["losses"][step]) / 2, expected)
        model.zero_grad()
        expected.backward()
    for found in ranks:
        torch.testing.assert_close(found["gradient"], model.weight.grad)
        torch.testing.assert_close(found["state"]["queue.keys"], loss.queue.keys)
    assert torch.equal(ranks[0]["state"]["queue.keys"], ranks[1]["state"]["queue.keys"])
    assert int(loss.queue.num_enqueued) == int(ranks[0]["state"]["queue.num_enqueued"]) == 32


def mean_loss_of_ranks(model: nn.Module, images: Tensor, views: Tensor, queue: Tensor, step: int) -> Tensor:
    """The mean of the losses of two ranks, each with its own draws."""
    losses = []
    for number, rows in enumerate((slice(0, 4), slice(4, 8))):
        draws = generator("mix negatives", 3, step, number)

        def mixes(similarity: Tensor, draws: torch.Generator = draws) -> list[Synthetics]:
            pool = hardest(similarity, 6)
            return [mix_pairs(queue, pool, 8, draws), mix_with_query(similarity, pool, 4, draws)]

        query, key = (F.normalize(model(each[rows]), dim=-1) for each in (images, views))
        losses.append(contrastive_loss(query, key, queue, 0.2, Given(make=mixes)).loss)
    return torch.stack(losses).mean()


class Pair(nn.Module):
    """A model that contains the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(encoder(), nn.Tanh(), nn.Linear(5, 5))
        self.encoder[2].weight.data, self.encoder[2].bias.data = embeddings(4, 5, 5), embeddings(5, 1, 5)[0]
        self.loss = criterion()

    def forward(self, images: Tensor, views: Tensor) -> Tensor:
        return self.loss(self.encoder(images), self.encoder(views).detach())


@pytest.mark.skipif(
    not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"])),
    reason="torch.compile needs a C++ compiler, and there is none",
)
def test_compiled_equals_eager() -> None:
    eager = Pair()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model)
    for step in range(3):
        for each in (eager, compiled):
            each.zero_grad()
        found, expected = compiled(*whole_batch(step)), eager(*whole_batch(step))
        found.backward()
        expected.backward()
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert model.loss.steps == 3
    torch.testing.assert_close(model.loss.queue.keys, eager.loss.queue.keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature: found 0\.0; expected a number above 0"),
        ({"temperature": -0.2}, r"temperature: found -0\.2; expected a number above 0"),
        ({"temperature": float("nan")}, r"temperature: found nan; expected a number above 0"),
        ({"temperature": float("inf")}, r"temperature: found inf; expected a number above 0"),
        ({"num_hardest": 25}, r"num_hardest: found 25; expected 2 to 24 \(queue_size\)"),
        ({"num_hardest": 1}, r"num_hardest: found 1; expected 2 to 24 \(queue_size\)"),
        ({"num_hardest": 0, "num_pair_synthetics": 0}, r"num_hardest: found 0; expected 1 to 24"),
        ({"queue_size": 0}, r"queue_size: found 0; expected at least 1"),
        ({"dim": 0}, r"dim: found 0; expected at least 1"),
        ({"num_pair_synthetics": -1}, r"num_pair_synthetics: found -1; expected at least 0"),
        ({"queue_size": 24.0}, r"queue_size: found 24\.0 \(float\); expected a whole number"),
        ({"queue_size": True}, r"queue_size: found True \(bool\); expected a whole number"),
        ({"dim": "5"}, r"dim: found '5' \(str\); expected a whole number"),
        ({"temperature": "0.2"}, r"temperature: found '0\.2' \(str\); expected a number"),
        ({"temperature": None}, r"temperature: found None \(NoneType\); expected a number"),
        ({"seed": 0.5}, r"seed: found 0\.5 \(float\); expected a whole number"),
        ({"num_hardest": 6.0}, r"num_hardest: found 6\.0 \(float\); expected a whole number"),
        ({"num_pair_synthetics": None}, r"num_pair_synthetics: found None \(NoneType\); expected a whole"),
        ({"num_query_synthetics": "4"}, r"num_query_synthetics: found '4' \(str\); expected a whole"),
        ({"through_query": 1}, r"through_query: found 1 \(int\); expected True or False"),
        ({"masks": "same_image"}, r"masks: found 'same_image'; expected a list of names"),
        ({"masks": None}, r"masks: found None; expected a list of names"),
        ({"masks": [3]}, r"masks: found 3; expected a name, one of class_oracle, same_image"),
    ],
)
def test_settings_of_another_type_or_out_of_range_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        criterion(**changes)


def test_numbers_of_numpy_are_numbers() -> None:
    loss = criterion(
        num_hardest=np.int64(6), temperature=np.float32(0.2), seed=np.int64(3), dim=np.int32(5)
    )
    expected = criterion(temperature=float(np.float32(0.2)))
    assert torch.equal(loss(embeddings(0), embeddings(1)), expected(embeddings(0), embeddings(1)))


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        (embeddings(0).long(), embeddings(1), r"query: found torch\.int64; expected .* floating-point"),
        ([[0.0]], embeddings(1), r"query: found list; expected .* floating-point"),
        (embeddings(0), embeddings(1).int(), r"key: found torch\.int32; expected .* floating-point"),
        (embeddings(0, 4, 6), embeddings(1, 4, 6), r"query: found shape \(4, 6\); expected \(batch, 5\)"),
        (embeddings(0), embeddings(1)[0], r"key: found shape \(5,\); expected \(batch, 5\)"),
        (embeddings(0, 0), embeddings(1, 0), r"query: found shape \(0, 5\); .* batch of at least 1"),
        (embeddings(0), embeddings(1, 3), r"found shapes \(4, 5\) and \(3, 5\); expected one shape"),
        (embeddings(0, 30), embeddings(1, 30), "queue_size: found 24, but a step has 30 keys; expected"),
        (embeddings(0).to("meta"), embeddings(1), "query: found on meta; the queue is on cpu"),
    ],
)  # fmt: skip
def test_invalid_inputs_are_refused(query: Any, key: Tensor, message: str) -> None:
    loss = criterion()
    before = copy.deepcopy(loss.queue.state_dict())
    with pytest.raises(ValueError, match=message):
        loss(query, key)
    assert all(torch.equal(before[name], value) for name, value in loss.queue.state_dict().items())


def test_a_second_derivative_is_refused() -> None:
    query = embeddings(0).requires_grad_()
    loss = criterion()(query, embeddings(1))
    with pytest.raises(ValueError, match="create_graph: found True; expected False"):
        torch.autograd.grad(loss, query, create_graph=True)
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient.any()
    with torch.no_grad():
        assert criterion()(query, embeddings(1)) == loss


def test_a_batch_larger_than_the_queue_can_be_evaluated() -> None:
    assert criterion().eval()(embeddings(0, 30), embeddings(1, 30)).isfinite()
    assert criterion()(embeddings(0, 30), embeddings(1, 30), enqueue=False).isfinite()
    loss = criterion()
    loss.enqueue(embeddings(1, 24))
    with pytest.raises(ValueError, match=r"queue_size: found 24, but a step has 25 keys; expected"):
        loss.enqueue(embeddings(1, 25))


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


RULES: dict[str, dict[str, Any]] = {
    "moco": {},
    "mochi": {"num_hardest": 6, "num_pair_synthetics": 8, "num_query_synthetics": 4},
    "debiased": {"positive_prior": 0.01},
    "hard_weighting": {"positive_prior": 0.01, "concentration": 0.5},
    "decoupled": {},
    "synco": {"num_hardest": 6, "num_interpolated": 4, "num_noisy": 3},
}


def by_name(rule: str, **changes: Any) -> ContrastiveLoss:
    return ContrastiveLoss(24, 5, 0.2, rule, **{"seed": 3, **RULES[rule], **changes})


@pytest.mark.parametrize("rule", RULES)
def test_any_rule_by_name(rule: str) -> None:
    """The loss equals the function's, a step works, and the GPU is not synchronised."""
    loss = by_name(rule)
    query, key = embeddings(0).requires_grad_(), embeddings(1)
    before = loss.queue.keys.clone()
    draws = generator("mix negatives", 3, 0, 0)
    units = [F.normalize(each, dim=-1) for each in (query, key)]
    expected = contrastive_loss(*units, before, 0.2, loss.rule, None, draws).loss
    found = loss(query, key)
    assert torch.equal(found, expected)
    found.backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert torch.equal(loss.queue.keys[:4], units[1])
    plain = by_name("moco")(query, key)
    assert torch.equal(by_name(rule)(query, key, synthesize=False), plain)
    assert torch.equal(found, plain) is (rule == "moco")
    assert loss(embeddings(0, 1), embeddings(1, 1)).isfinite()
    with simulated_gpu() as gpu:
        loss.to("cuda")
        query, key = embeddings(0).to("cuda").requires_grad_(), embeddings(1).to("cuda")
        gpu.waits.clear()
        loss(query, key).backward()
        assert not gpu.waits


def test_mochi_by_name_is_mochi_loss() -> None:
    query, key = embeddings(0), embeddings(1)
    assert torch.equal(by_name("mochi")(query, key), criterion()(query, key))


def test_rules_and_masks_can_be_given_as_objects() -> None:
    query, key = embeddings(0), embeddings(1)
    rule = HardWeighting(positive_prior=0.01, concentration=0.5)
    assert torch.equal(
        ContrastiveLoss(24, 5, 0.2, rule, seed=3)(query, key), by_name("hard_weighting")(query, key)
    )
    assert by_name("moco", masks=[SameImage()]).masks == by_name("moco", masks=["same_image"]).masks


def test_masks_leave_out_older_keys_of_the_same_image_and_class() -> None:
    """Replacing those keys by any others does not change the loss."""
    images, labels = torch.tensor([7, 8, 9, 4]), torch.tensor([0, 1, -1, 0])
    first = by_name("debiased", masks=["same_image", "class_oracle"])
    first.enqueue(embeddings(1), labels=labels, images=images)
    other = copy.deepcopy(first)
    query, key = embeddings(2, 1), embeddings(3, 1)
    asked = {"labels": torch.tensor([1]), "images": torch.tensor([4])}  # rows 1 (class) and 3 (image)
    other.queue.keys[[1, 3]] = F.normalize(embeddings(4, 2), dim=-1)
    found = first(query, key, enqueue=False, **asked)
    assert torch.equal(found, other(query, key, enqueue=False, **asked))
    other.queue.keys[0] = -other.queue.keys[0]
    assert not torch.equal(found, other(query, key, enqueue=False, **asked))
    first(query, key, **asked)
    assert first.queue.images[:6].tolist() == [7, 8, 9, 4, 4, -1]
    assert first.queue.labels[:6].tolist() == [0, 1, -1, 0, 1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "debaised"}, "rule: found 'debaised'; did you mean 'debiased'\\? allowed: debiased, "),
        ({"rule": "same_image"}, "rule: found 'same_image'; allowed: debiased, "),
        ({"rule": "moco", "masks": ["mochi"]}, "masks: found 'mochi'; allowed: class_oracle, same_image"),
        ({"rule": "debiased", "positive_prio": 1}, "no setting of debiased; .* mean 'positive_prior'"),
        ({"rule": "debiased", "positive_prior": 1}, "positive_prior: found 1; expected 0 or more"),
        ({"rule": "mochi"}, "num_hardest, num_pair_.*: missing; the rule mochi"),
        ({"rule": "synco"}, r"num_hardest: found 1024; expected 2 to 24 \(queue_size\)"),
        ({"rule": HardWeighting(), "concentration": 2.0}, "concentration: found with a Rule object"),
        ({"rule": HardWeighting}, "rule: found <class .*; expected a name, one of debiased, "),
        ({"rule": "debiased", "positive_prior": "0.1"}, r"positive_prior: found '0\.1' \(str\); expected"),
    ],
)  # fmt: skip
def test_invalid_rules_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(24, 5, 0.2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "images: missing; a mask in .* needs them"),
        ({"images": torch.arange(3)}, r"images: found torch.int64 of shape \(3,\); expected integers"),
        ({"images": torch.zeros(4)}, "images: found torch.float32"),
        ({"images": torch.ones(4, dtype=torch.bool)}, r"images: found torch.bool of shape \(4,\)"),
        ({"images": [0, 1, 2, 3]}, r"images: found list; expected integers of shape \(4,\) as a tensor"),
    ],
)
def test_invalid_image_indices_are_refused(arguments: dict[str, Tensor], message: str) -> None:
    loss = by_name("moco", masks=["same_image"])
    with pytest.raises(ValueError, match=message):
        loss(embeddings(0), embeddings(1), **arguments)
    with pytest.raises(ValueError, match=message):
        loss.enqueue(embeddings(1), **arguments)
    assert int(loss.queue.num_enqueued) == 0


def test_importing_mochi_is_light() -> None:
    """The command line imports the package; the loss needs none of the pipeline's packages."""
    code = "import sys, mochi; assert mochi.__version__; print('torch' in sys.modules)"
    assert run_python(code) == "False\n"
    heavy = [
        "pandas",
        "snakemake",
        "dvc",
        "matplotlib",
        "pydantic",
        "yaml",
        "pyarrow",
        "PIL",
        "safetensors",
    ]
    code = (
        "import sys; from mochi import ContrastiveLoss, KeyQueue, MoCHiLoss, contrastive_loss; "
        "ContrastiveLoss(8, 2, 0.2, rule='synco', num_hardest=4); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert run_python(code) == "[]\n"


def test_public_names() -> None:
    import mochi

    assert set(mochi.__all__) == {
        "ContrastiveLoss",
        "KeyQueue",
        "MoCHiLoss",
        "__version__",
        "contrastive_loss",
        "load_encoder",
    }
    assert set(mochi.__all__) <= set(dir(mochi))
    assert all(getattr(mochi, name) is not None for name in mochi.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'MochiLoss'"):
        mochi.MochiLoss  # noqa: B018
