"""Optimizers of pretraining and their learning rates."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mochi.config import Training


class LARS(torch.optim.Optimizer):
    """SGD with each parameter's step scaled to the norm of the parameter (You et al. 2017).

        g' = g + weight_decay * w;   rate = trust * |w| / |g'|  (1 where either norm is 0)
        v <- momentum * v + rate * g';   w <- w - lr * v

    Parameters of at most one dimension (biases, batch norm) get neither scaling nor decay.

    Source: You et al. 2017 (arXiv:1708.03888), algorithm 1; facebookresearch/moco-v3 moco/optimizer.py.
    Deviation of both from the paper: the norm of the decayed gradient instead of |g| + weight_decay * |w|,
    and the learning rate outside the momentum.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, without synchronising with the GPU."""
        assert closure is None
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not with_gradient:
                continue
            updates: list[Tensor] = [parameter.grad for parameter in with_gradient]
            scaled = [index for index, parameter in enumerate(with_gradient) if parameter.ndim > 1]
            if scaled:
                weights = [with_gradient[index] for index in scaled]
                gradients = torch._foreach_add(
                    [updates[index] for index in scaled], weights, alpha=group["weight_decay"]
                )
                weight_norms = torch.stack(torch._foreach_norm(weights))
                gradient_norms = torch.stack(torch._foreach_norm(gradients))
                rates = group["trust_coefficient"] * weight_norms / gradient_norms
                rates = rates.where((weight_norms > 0) & (gradient_norms > 0), 1.0)
                torch._foreach_mul_(gradients, list(rates.unbind()))
                for index, gradient in zip(scaled, gradients, strict=True):
                    updates[index] = gradient
            buffers = [self._buffer(parameter) for parameter in with_gradient]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(with_gradient, buffers, alpha=-group["lr"])

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def make_optimizer(module: nn.Module, recipe: Training) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters. For AdamW `momentum` is beta1."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    lr, decay = recipe.lr, recipe.weight_decay
    match recipe.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=lr, momentum=recipe.momentum, weight_decay=decay, foreach=True
            )
        case "lars":
            return LARS(parameters, lr, recipe.momentum, decay)
        case "adamw":
            betas = (recipe.momentum, 0.999)
            return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay, foreach=True)


def learning_rate(recipe: Training, epoch: int, done: float = 0.0) -> float:
    """The learning rate in an epoch of which the fraction `done` is completed.

    In the warm-up the rate rises linearly with every step (Goyal et al. 2017). If `done` includes the
    current step, the last step of the warm-up has the full rate. Afterwards the rate is constant within an
    epoch, as in facebookresearch/moco main_moco.py, `adjust_learning_rate`. The cosine begins where the
    warm-up ends, as in facebookresearch/moco-v3 main_moco.py; the drops of `step` are at 60% and 80% of all
    epochs, as in main_moco.py (120 and 160 of 200).
    """
    warmup = recipe.warmup_epochs
    if epoch < warmup:
        return recipe.lr * (epoch + done) / warmup
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (recipe.epochs - warmup)))
    drops = sum(epoch >= share * recipe.epochs for share in (0.6, 0.8))
    return recipe.lr * 0.1**drops
