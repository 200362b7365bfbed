# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from torch import nn


def is_unmodified(*modules: nn.Module) -> bool:
    """Whether a faster op may read the weights of modules instead of calling them.

    Not if one has hooks, or was replaced or wrapped, e.g. for LoRA, for quantisation or
    for a parametrisation: calling it does more than its class says.

    Args:
        *modules (nn.Module): Linear layers, convolutions and normalisations.
    """
    return all(
        type(module).__module__.startswith(('torch.nn.modules.', __package__))
        and not has_hooks(module)
        for module in modules
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module does more than its forward method."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
