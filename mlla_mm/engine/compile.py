# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""``torch.compile`` for the backbone alone."""

from typing import Any

from torch import nn

from ..compat.pytorch import require_compiler
from ..models.backbones.staged import StagedBackbone


def compile_backbone(model: nn.Module, **options: Any) -> None:
    """Run the forward pass of a model's backbone through ``torch.compile``.

    With ``MLLA_OPS=fused`` in the environment the compiled graphs contain Triton's
    kernels of convolutions and attention, on a GPU that runs them. Otherwise the
    compiler makes all kernels itself.

    The recurrence of a forget gate is left out: it runs as it does without a compiler,
    between the compiled parts of a block.

    The first call compiles for its image size. The first call with another size
    compiles for all sizes. Training and evaluation are compiled separately. A copy of
    the model may not be compiled. A compiled model cannot be traced, exported or
    counted.

    The option ``layout_optimization`` is off, unless ``mode`` or another ``backend`` is
    given: the feature maps have the right memory layout already, and the compiler fails
    on the gradients if image sizes vary (PyTorch 2.11).

    Args:
        model (nn.Module): An MLLA or LinearAttentionSwin, or a model that has one or
            several; changed in place.
        **options: Arguments for ``torch.compile``.

    Raises:
        ValueError: If there is no such backbone, or PyTorch is older than 2.2.

    Examples:
        >>> from mlla_mm import get_model
        >>> from mlla_mm.engine.compile import compile_backbone
        >>> model = get_model('mlla-t').eval()
        >>> compile_backbone(model)
    """
    require_compiler('compile')
    backbones = [x for x in model.modules() if isinstance(x, StagedBackbone)]
    if not backbones:
        raise ValueError(
            f'{type(model).__name__} has no MLLA and no LinearAttentionSwin, whose '
            'forward pass could be compiled.'
        )
    if options.get('mode') is None and options.get('backend', 'inductor') == 'inductor':
        own = options.get('options') or {}
        options['options'] = {'layout_optimization': False, **own}
    for backbone in backbones:
        backbone.compile(**options)
