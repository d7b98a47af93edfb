"""Optimizers compared with updates written from the papers; schedules with numbers."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mochi.config import ConfigError, Experiment, Training, pretrain_run
from mochi.pretraining.optimizers import LARS, learning_rate, make_optimizer
from mochi.pretraining.stage import _Session
from tests.pretraining.runs import encoder_bytes, train
from tests.tiny import MOCHI, with_recipe


def recipe_of(experiment: Experiment) -> Training:
    recipe = pretrain_run(experiment, MOCHI, 0).recipe
    assert isinstance(recipe, Training)
    return recipe


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)).double()


def gradients(module: nn.Module, step: int) -> None:
    """Some gradient for every parameter; the first weight's is zero in one step."""
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(module.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
        if step == 1 and index == 0:
            parameter.grad.zero_()


def lars_reference(
    weight: Tensor, gradient: Tensor, velocity: Tensor, lr: float, decay: float
) -> tuple[Tensor, Tensor]:
    """One step with momentum 0.9, in plain numbers."""
    if weight.ndim > 1:
        gradient = gradient + decay * weight
        size = math.sqrt(sum(float(value) ** 2 for value in weight.flatten()))
        pull = math.sqrt(sum(float(value) ** 2 for value in gradient.flatten()))
        gradient = gradient * (0.001 * size / pull if size and pull else 1)
    velocity = 0.9 * velocity + gradient
    return weight - lr * velocity, velocity


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lars_equals_the_papers_update(decay: float) -> None:
    """Without decay the norm of one gradient is 0 in one step."""
    module = network()
    with torch.no_grad():
        module[0].weight.mul_(0.1)  # of a norm below 1
        module[3].weight.zero_()  # a weight of norm 0 uses the gradient unchanged
    recipe = recipe_of(with_recipe(optimizer="lars", lr=0.5, momentum=0.9, weight_decay=decay))
    optimizer = make_optimizer(module, recipe)
    assert isinstance(optimizer, LARS)
    expected = [
        (parameter.detach().clone(), torch.zeros_like(parameter)) for parameter in module.parameters()
    ]
    for step, lr in enumerate((0.5, 0.5, 0.1)):
        optimizer.param_groups[0]["lr"] = lr
        gradients(module, step)
        expected = [
            lars_reference(weight, parameter.grad, velocity, lr, decay)  # type: ignore[arg-type]
            for (weight, velocity), parameter in zip(expected, module.parameters(), strict=True)
        ]
        optimizer.step()
        for (weight, _), parameter in zip(expected, module.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-14)


def test_lars_skips_parameters_without_a_gradient() -> None:
    module = network()
    optimizer = LARS(module.parameters(), 0.1, 0.9, 0.1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, module.parameters()))
    assert not optimizer.state


def test_adamw_decouples_weight_decay_from_the_gradient() -> None:
    """Loshchilov & Hutter 2019, algorithm 2."""
    module = nn.Linear(3, 2).double()
    recipe = recipe_of(with_recipe(optimizer="adamw", lr=0.01, momentum=0.8, weight_decay=0.1))
    optimizer = make_optimizer(module, recipe)
    weight = module.weight.detach().clone()
    first = second = torch.zeros_like(weight)
    for step in (1, 2, 3):
        gradients(module, step)
        gradient = module.weight.grad
        assert gradient is not None
        first = 0.8 * first + 0.2 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        move = (first / (1 - 0.8**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight - 0.01 * 0.1 * weight - 0.01 * move
        optimizer.step()
    torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-12, atol=1e-14)


def test_sgd_is_the_default() -> None:
    """Weight decay is part of the gradient: v <- mu v + g + decay w, w <- w - lr v."""
    module = nn.Linear(3, 2).double()
    optimizer = make_optimizer(module, recipe_of(with_recipe(lr=0.5, momentum=0.8, weight_decay=0.1)))
    assert isinstance(optimizer, torch.optim.SGD)
    weight = module.weight.detach().clone()
    velocity = torch.zeros_like(weight)
    for step in range(3):
        gradients(module, step)
        gradient = module.weight.grad
        assert gradient is not None
        velocity = 0.8 * velocity + gradient + 0.1 * weight
        weight = weight - 0.5 * velocity
        optimizer.step()
    torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [1.0, 0.5 * (1 + math.cos(0.1 * math.pi))]), ("step", [1.0, 1.0])],
)
def test_learning_rates(schedule: str, expected: list[float]) -> None:
    recipe = recipe_of(with_recipe(schedule=schedule, epochs=10, lr=1.0))
    rates = [learning_rate(recipe, epoch, 0.3) for epoch in range(10)]
    assert rates[:2] == pytest.approx(expected)
    last = 0.5 * (1 + math.cos(0.9 * math.pi)) if schedule == "cosine" else 0.01
    assert rates[9] == pytest.approx(last)
    if schedule == "step":
        assert rates[5:9] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_the_warmup_ends_where_the_cosine_starts() -> None:
    recipe = recipe_of(with_recipe(epochs=10, lr=2.0, warmup_epochs=2))
    rising = [learning_rate(recipe, epoch, done) for epoch in (0, 1) for done in (0.25, 0.5, 0.75, 1)]
    assert rising == pytest.approx([2 * share / 8 for share in range(1, 9)])
    assert learning_rate(recipe, 2, 0.5) == 2.0
    assert learning_rate(recipe, 6, 0.5) == pytest.approx(1.0)
    assert learning_rate(recipe, 9) == pytest.approx(1 + math.cos(math.pi * 7 / 8))


def test_a_warmup_as_long_as_the_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_epochs: found 2; must be smaller than epochs = 2"):
        with_recipe(warmup_epochs=2)


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_a_resumed_training_ends_with_the_same_bytes(
    optimizer: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = with_recipe(optimizer=optimizer, warmup_epochs=1, lr=0.01)
    whole = train(experiment, tiny_data, tmp_path / "whole")
    count, advance = 0, _Session.step_done

    def stop(self: _Session, state: object) -> None:
        nonlocal count
        count += 1
        advance(self, state)  # type: ignore[arg-type]
        if count == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Session, "step_done", stop)
    with pytest.raises(KeyboardInterrupt):
        train(experiment, tiny_data, tmp_path / "resumed")
    monkeypatch.undo()
    assert train(experiment, tiny_data, tmp_path / "resumed") == whole == encoder_bytes(tmp_path / "whole")
