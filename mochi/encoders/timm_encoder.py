"""Encoders of timm, by name: `architecture: timm:NAME`, randomly initialised."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mochi.config import ConfigError, Encoder
from mochi.encoders.backbone import Backbone


class TimmEncoder(Backbone):
    """A model of timm without its classifier. Its batch norms become `norm_layer`; the rest is timm's.

    Raises:
        ConfigError: timm has no such model.
        ModuleNotFoundError: timm is not installed.
    """

    def __init__(self, config: Encoder, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        import timm  # noqa: PLC0415 (an extra)

        self.config = config
        name = config.architecture.removeprefix("timm:")
        if not timm.is_model(name):
            raise ConfigError(
                f"encoder.architecture: found timm:{name}; timm {timm.__version__} has no such model; "
                "timm.list_models() lists all"
            )
        model: Any = timm.create_model(name, pretrained=False, num_classes=0)
        self.model = model
        self.num_features = getattr(model, "head_hidden_size", None) or model.num_features
        if norm_layer is not nn.BatchNorm2d:
            _replace_norms(self.model, norm_layer)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        features: Tensor = self.model(images)
        return features


def _replace_norms(parent: nn.Module, norm_layer: Callable[[int], nn.Module]) -> None:
    for name, child in parent.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new: Any = norm_layer(child.num_features)
            new.eps, new.momentum = child.eps, child.momentum
            new.load_state_dict(child.state_dict())
            after = [module for key, module in child.named_children() if key in {"drop", "act"}]
            new.register_forward_hook(_AfterNorm(*after))  # timm's BatchNormAct2d applies both afterwards
            setattr(parent, name, new)
        else:
            _replace_norms(child, norm_layer)


class _AfterNorm(nn.Sequential):
    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Any:
        return super().__call__(output)
