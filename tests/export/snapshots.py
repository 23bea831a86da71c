"""All of a module, and of the process, that an export must leave as it was."""

import random
from typing import Any

import numpy
import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Plain values that are equal if nothing has changed."""
    modules = list(model.modules())
    state = model.state_dict(keep_vars=True)
    return {
        "tensors": {name: tensor.tolist() for name, tensor in state.items()},
        "objects": [id(tensor) for tensor in state.values()],
        "grads": [id(parameter.grad) for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in modules],
        "attributes": [{name: id(value) for name, value in vars(module).items()} for module in modules],
        "hooks": [
            list(table)
            for module in modules
            for name, table in vars(module).items()
            if name.endswith("_hooks") and table is not None
        ],
        "random": (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()),
        "threads": torch.get_num_threads(),
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
    }
