# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import Tuple, Type, Union

from torch import nn


def is_unmodified(
    kinds: Union[Type[nn.Module], Tuple[Type[nn.Module], ...]], *modules: nn.Module
) -> bool:
    """Whether a faster op may read the weights of modules instead of calling them.

    Not if one has hooks, or was replaced or wrapped, e.g. by another kind of layer, for
    LoRA, for quantisation or for a parametrisation: calling it does something else.

    Args:
        kinds (type | tuple[type]): What all modules have to be, subclasses excluded.
        *modules (nn.Module): The modules.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return all(type(module) in kinds and not _has_hooks(module) for module in modules)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
