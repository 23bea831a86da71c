"""Find the averaged copies of a network (EMA, SWA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_light.errors import UnsupportedError
from lightning_light.host.callbacks import averaged_model
from lightning_light.host.trainer import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def averaged_models_of(trainer: Trainer | None, pl_module: nn.Module) -> list[nn.Module]:
    """Return the averaged copies of ``pl_module`` that callbacks keep (EMA, SWA, a teacher that follows the student).

    Each pairs its tensors with those of the live module by position, so it has to change with it.

    Args:
        trainer: the Trainer; without one there are no copies.
        pl_module: the live module.
    """
    models = [] if trainer is None else [averaged_model(callback) for callback in callbacks_of(trainer)]
    return [model for model in models if isinstance(model, type(pl_module)) and model is not pl_module]


def check_averaged_models(trainer: Trainer, pl_module: nn.Module) -> None:
    """Refuse, before training, an averaged copy that lacks parameters, since no change of the network can follow there.

    Raises:
        UnsupportedError: a copy was made before the layers were, as ``StochasticWeightAveraging`` does.
    """
    names = [name for name, _ in pl_module.named_parameters()]
    for copy in averaged_models_of(trainer, pl_module):
        known = {name for name, _ in copy.named_parameters()}
        if missing := [name for name in names if name not in known]:
            raise UnsupportedError(
                f"`{type(pl_module).__name__}` beside a callback that averages its weights: expected a copy with the "
                f"parameters of the module, found none named `{missing[0]}`: the copy was made before "
                "`configure_model`. Make the layers in `__init__`, or average with `EMAWeightAveraging`, which copies "
                "later."
            )
