# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A stand-in for ``mmcv._ext``, mmcv's compiled extension.

mmcv from the package index usually has no compiled ops. Then ``import mmcv.ops``, and
so ``import mmdet``, fails with ``No module named 'mmcv._ext'``. :func:`install` makes a
module of this name. With torchvision's kernels and plain PyTorch, it computes the ops
that follow, on the CPU and on GPUs. Every other op raises an error when it is called.

- :mod:`.boxes`: NMS, soft NMS, groups of NMS, overlaps
- :mod:`.rois`: RoIAlign with average pooling, RoIPool
- :mod:`.focal_loss`: focal loss of sigmoid and softmax
- :mod:`.deformable`: multi-scale deformable attention, deformable convolution
- :mod:`.masked_conv`: convolution at chosen pixels

Arguments have the names and the order of the extension. Outputs and gradients are
written to tensors that mmcv passes. Half precision is computed in float32. Arguments
for workspace, such as ``im2col_step``, are unused.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, Callable

import torch

from .boxes import bbox_overlaps, nms, nms_match, softnms
from .common import commands, missing_message
from .deformable import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from .focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from .masked_conv import masked_col2im_forward, masked_im2col_forward
from .rois import (
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
)

_NAME = 'mmcv._ext'


def get_compiler_version() -> str:
    """Return 'not compiled', for the environment report of mmcv."""
    return 'not compiled'


def get_compiling_cuda_version() -> str:
    """Return 'not compiled', for the environment report of mmcv."""
    return 'not compiled'


_FUNCTIONS = (
    bbox_overlaps,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    get_compiler_version,
    get_compiling_cuda_version,
    masked_col2im_forward,
    masked_im2col_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
    nms,
    nms_match,
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
    softnms,
)


def install() -> bool:
    """Put the stand-in in ``sys.modules``, unless the compiled ``mmcv._ext`` loads.

    Call this before anything imports ``mmcv.ops``. A second call changes nothing. The
    stand-in also replaces a compiled extension that does not load because it was built
    for another PyTorch; then a warning gives the reason.

    Returns:
        bool: Whether the stand-in is active. It is not if the compiled extension loads,
        or if mmcv is not installed.
    """
    if is_stand_in():
        return True
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None or _compiled_loads(mmcv):
        return False
    module = _StandIn(_NAME, __doc__)
    # MMEngine calls find_spec('mmcv._ext'), and mmcv asks for the loader.
    module.__spec__ = ModuleSpec(_NAME, Loader(), origin=__file__)
    for function in _FUNCTIONS:
        setattr(module, function.__name__, function)
    sys.modules[_NAME] = module
    return True


def is_stand_in() -> bool:
    """Tell whether ``mmcv._ext`` is the stand-in.

    Returns:
        bool: True if :func:`install` has put it in place. False if ``mmcv._ext`` is the
        compiled extension, or was not imported.
    """
    return isinstance(sys.modules.get(_NAME), _StandIn)


def _compiled_loads(mmcv: ModuleSpec) -> bool:
    """Import the compiled extension of mmcv, if there is one."""
    if _NAME in sys.modules:
        return True
    # find_spec('mmcv._ext') would import mmcv and OpenCV.
    if PathFinder.find_spec(_NAME, mmcv.submodule_search_locations) is None:
        return False
    importlib.import_module('mmcv')  # errors of mmcv itself are raised here
    try:
        importlib.import_module(_NAME)
    except (ImportError, OSError) as error:
        warnings.warn(
            f"mmcv's compiled ops do not load ({error}), so torchvision's are used. "
            'They were probably built for another PyTorch than '
            f'{torch.__version__}. To rebuild them:\n{commands()}',
            stacklevel=3,
        )
        return False
    return True


class _StandIn(types.ModuleType):
    """The module ``mmcv._ext``. Each op that it lacks is a function that raises."""

    def __getattr__(self, name: str) -> Callable:
        # Python looks for names such as __path__, which must not be there.
        if name.startswith('__'):
            raise AttributeError(f'module {_NAME!r} has no attribute {name!r}')

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(missing_message(f'The op {name!r}'))

        missing.__name__ = name
        return missing
