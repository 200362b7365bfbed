# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A stand-in for ``mmcv._ext``, mmcv's compiled extension.

Installing mmcv from the package index gives, as a rule, a build without compiled ops,
and ``import mmcv.ops`` (hence ``import mmdet``) then fails with
``No module named 'mmcv._ext'``. :func:`install` puts a module of that name in place. It
computes what Mask R-CNN and the common dense detectors need with torchvision's kernels
and plain PyTorch, on the CPU and on GPUs; every other op raises when it is called.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import types
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, Callable

import torch
from torch import Tensor

_NAME = 'mmcv._ext'
_NOT_COMPILED = 'not compiled'


def install() -> bool:
    """Put the stand-in in ``sys.modules`` unless a compiled ``mmcv._ext`` loads.

    It must run before anything imports ``mmcv.ops``. Running it again changes nothing.
    A compiled extension that does not load (it was built for another PyTorch) is
    replaced too, with a warning that gives the reason.

    Returns:
        bool: Whether the stand-in is active. It is not where the compiled extension
        loads, nor where mmcv is not installed.
    """
    if is_stand_in():
        return True
    if importlib.util.find_spec('mmcv') is None or _compiled_loads():
        return False
    spec = ModuleSpec(_NAME, _StandInLoader(), origin=__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return True


def is_stand_in() -> bool:
    """Tell whether ``mmcv._ext`` is the stand-in.

    Returns:
        bool: True after :func:`install` put it in place, False where ``mmcv._ext`` is
        the compiled extension or has not been imported.
    """
    return isinstance(sys.modules.get(_NAME), _StandIn)


def _compiled_loads() -> bool:
    """Import the compiled extension if there is one."""
    if _NAME in sys.modules:
        return True
    # find_spec('mmcv._ext') would import mmcv, and with it OpenCV, only to look.
    locations = importlib.util.find_spec('mmcv').submodule_search_locations
    if PathFinder.find_spec(_NAME, locations) is None:
        return False
    importlib.import_module('mmcv')  # its own errors are not the extension's
    try:
        importlib.import_module(_NAME)
    except (ImportError, OSError) as error:
        warnings.warn(
            f"mmcv's compiled ops do not load ({error}); torchvision's are used in "
            f'their place. They were probably built for another PyTorch than '
            f'{torch.__version__}. To rebuild them:\n{_commands()}',
            stacklevel=3,
        )
        return False
    return True


class _StandIn(types.ModuleType):
    """The module that answers to ``mmcv._ext``."""

    def __getattr__(self, name: str) -> Callable:
        # hasattr(module, '__path__') and its like decide how Python treats a module.
        if name.startswith('__'):
            raise AttributeError(f'module {_NAME!r} has no attribute {name!r}')
        return _missing_op(name)


class _StandInLoader(importlib.abc.Loader):
    """Makes the module; gives it a ``__spec__`` that ``find_spec`` accepts."""

    def create_module(self, spec: ModuleSpec) -> _StandIn:
        return _StandIn(spec.name, __doc__)

    def exec_module(self, module: _StandIn) -> None:
        for function in (
            nms,
            softnms,
            roi_align_forward,
            roi_align_backward,
            sigmoid_focal_loss_forward,
            sigmoid_focal_loss_backward,
            get_compiler_version,
            get_compiling_cuda_version,
        ):
            setattr(module, function.__name__, function)


def _missing_op(name: str) -> Callable:
    """Make the function that stands for an op which only compiled mmcv has."""

    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(_missing_message(f'The op {name!r}'))

    missing.__name__ = name
    return missing


def _commands() -> str:
    """Commands that install compiled mmcv."""
    # Imported late: nothing may come between the package's import and install().
    from .stack import compiled_mmcv_commands

    return compiled_mmcv_commands()


def _missing_message(what: str) -> str:
    return (
        f"{what} needs mmcv's compiled ops, and this mmcv was installed without them. "
        f'To get them:\n{_commands()}'
    )


def get_compiler_version() -> str:
    """Say that no compiler was used; mmcv's environment report prints it."""
    return _NOT_COMPILED


def get_compiling_cuda_version() -> str:
    """Say that no CUDA compiler was used; mmcv's environment report prints it."""
    return _NOT_COMPILED


def _torchvision_ops() -> Any:
    """Import torchvision, which registers its kernels, and return their namespace."""
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError) as error:
        # A torchvision for another PyTorch fails with a RuntimeError (operator
        # torchvision::nms does not exist).
        raise ImportError(
            "Without mmcv's compiled ops, NMS and RoIAlign need a torchvision that "
            f'goes with PyTorch {torch.__version__}, and importing torchvision failed: '
            f'{error}. `python -m mlla_mm.utils.collect_env` names the version to '
            'install.'
        ) from error
    return torch.ops.torchvision


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Raise half precision to float32.

    The kernels lack bfloat16 (and NMS lacks float16 on the CPU), and a coordinate above
    256 is off by a pixel in bfloat16 arithmetic, one above 2048 in float16.
    """
    return tensor.float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor


def _as_float32(value: float) -> float:
    """Round a threshold as compiled mmcv does, which passes it as a C++ float.

    Overlaps that equal the threshold would be decided differently otherwise.
    """
    return torch.tensor(value, dtype=torch.float32).item()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels, of shape (N, 4).
        scores (Tensor): Scores of shape (N, ).
        iou_threshold (float): A box that overlaps a better one by more is dropped.
        offset (int): 0, or 1 where a box is ``x2 - x1 + 1`` pixels wide.

    Returns:
        Tensor: Indices of the kept boxes, int64, best score first.
    """
    boxes = _at_least_float32(boxes)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    scores = scores.to(boxes.dtype)
    return _torchvision_ops().nms(boxes, scores, _as_float32(iou_threshold))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft NMS (Bodla et al., ICCV 2017): overlapped boxes lose score, not life.

    The arrays are rearranged as in compiled mmcv (the best box is swapped to the front,
    the last one fills the place of a dropped one), so equal scores are taken in the
    same order.

    Args:
        boxes (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels, of shape (N, 4), CPU.
        scores (Tensor): Scores of shape (N, ).
        dets (Tensor): Receives the K kept boxes and their new scores in its first K
            rows, of shape (N, 5).
        iou_threshold (float): Overlap from which methods 0 and 1 reduce a score.
        sigma (float): Width of method 2's Gaussian.
        min_score (float): A box whose score falls below it is dropped.
        method (int): 0 drops the score to 0, 1 multiplies it by ``1 - IoU``, 2 by
            ``exp(-IoU^2 / sigma)``.
        offset (int): 0, or 1 where a box is ``x2 - x1 + 1`` pixels wide.

    Returns:
        Tensor: Indices of the kept boxes, int64, of shape (K, ).
    """
    boxes, scores = _at_least_float32(boxes), _at_least_float32(scores).clone()
    min_score = _as_float32(min_score)
    order = torch.arange(len(boxes), device=boxes.device)
    done = 0
    while done < len(order):
        best = done + int(scores[done:].argmax())
        order[[done, best]] = order[[best, done]]
        scores[[done, best]] = scores[[best, done]]
        dets[done, :4] = boxes[order[done]]
        dets[done, 4] = scores[done]
        done += 1
        overlaps = _overlaps(boxes[order[done - 1]], boxes[order[done:]], offset)
        decay = _softnms_decay(overlaps, _as_float32(iou_threshold), sigma, method)
        scores[done:] *= decay
        kept = done + _fill_from_the_end(~(scores[done:] < min_score))
        order = torch.cat([order[:done], order[kept]])
        scores = torch.cat([scores[:done], scores[kept]])
    return order


def _overlaps(box: Tensor, others: Tensor, offset: int) -> Tensor:
    """IoU of one box with others, of shape (N, )."""
    top_left = torch.max(box[:2], others[:, :2])
    bottom_right = torch.min(box[2:], others[:, 2:])
    intersection = (bottom_right - top_left + offset).clamp(min=0).prod(-1)
    area = (box[2:] - box[:2] + offset).prod(-1)
    areas = (others[:, 2:] - others[:, :2] + offset).prod(-1)
    return intersection / (area + areas - intersection)


def _softnms_decay(
    overlaps: Tensor, iou_threshold: float, sigma: float, method: int
) -> Tensor:
    """What soft NMS multiplies the scores by, of shape (N, )."""
    if method == 2:
        return torch.exp(-(overlaps * overlaps) / sigma)
    reduced = 1 - overlaps if method == 1 else torch.zeros_like(overlaps)
    return torch.where(overlaps >= iou_threshold, reduced, torch.ones_like(overlaps))


def _fill_from_the_end(keep: Tensor) -> Tensor:
    """Order of an array after each dropped entry was replaced by the last one left.

    Args:
        keep (Tensor): Which entries stay, bool, of shape (N, ).

    Returns:
        Tensor: Indices of the K entries that stay, of shape (K, ).
    """
    number = int(keep.sum())
    order = torch.arange(number, device=keep.device)
    order[~keep[:number]] = number + keep[number:].nonzero()[:, 0].flip(0)
    return order


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., ICCV 2017) with average pooling.

    Args:
        input (Tensor): Features of shape (N, C, H, W).
        rois (Tensor): Image index and ``(x1, y1, x2, y2)`` in input pixels, of shape
            (K, 5).
        output (Tensor): Receives the result, of shape
            (K, C, aligned_height, aligned_width).
        argmax_y (Tensor): Unused; for max pooling.
        argmax_x (Tensor): Unused; for max pooling.
        aligned_height (int): Number of bins along y.
        aligned_width (int): Number of bins along x.
        spatial_scale (float): Feature pixels per input pixel.
        sampling_ratio (int): Samples per bin and side; 0 means one per feature pixel.
        pool_mode (int): 1, average pooling.
        aligned (bool): Whether pixel centres lie at half-integer coordinates.

    Raises:
        NotImplementedError: If ``pool_mode`` is 0, max pooling.
    """
    _check_pool_mode(pool_mode)
    features = _at_least_float32(input)
    output.copy_(
        _torchvision_ops().roi_align(
            features,
            rois.to(features.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            sampling_ratio,
            aligned,
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of :func:`roi_align_forward` to ``grad_input``.

    Args:
        grad_output (Tensor): Gradient of the output, of shape
            (K, C, aligned_height, aligned_width).
        rois (Tensor): As in :func:`roi_align_forward`.
        argmax_y (Tensor): Unused; for max pooling.
        argmax_x (Tensor): Unused; for max pooling.
        grad_input (Tensor): Is added to, of shape (N, C, H, W).
        aligned_height (int): As in :func:`roi_align_forward`.
        aligned_width (int): As in :func:`roi_align_forward`.
        spatial_scale (float): As in :func:`roi_align_forward`.
        sampling_ratio (int): As in :func:`roi_align_forward`.
        pool_mode (int): 1, average pooling.
        aligned (bool): As in :func:`roi_align_forward`.

    Raises:
        NotImplementedError: If ``pool_mode`` is 0, max pooling.
    """
    _check_pool_mode(pool_mode)
    grad = _at_least_float32(grad_output)
    grad_input.add_(
        _torchvision_ops()._roi_align_backward(
            grad,
            rois.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            _missing_message("RoIAlign with pool_mode='max' (not 'avg')")
        )


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    r"""Focal loss (Lin et al., ICCV 2017) of every sample and class.

    With :math:`p = \sigma(x)` it is :math:`-\alpha (1 - p)^\gamma \log p` for the
    sample's own class and :math:`-(1 - \alpha) p^\gamma \log(1 - p)` for the others.

    Args:
        input (Tensor): Logits of shape (N, C).
        target (Tensor): Class of each sample, int64, of shape (N, ); C means
            background.
        weight (Tensor): Weight of each class, of shape (C, ), or empty for none. With
            weights no sample may be background.
        output (Tensor): Receives the losses, of shape (N, C).
        gamma (float): Focusing exponent.
        alpha (float): Weight of the positive term.
    """
    prob, log_prob, log_rest = _probabilities(input)
    own = -alpha * (1 - prob).pow(gamma) * log_prob
    others = -(1 - alpha) * prob.pow(gamma) * log_rest
    output.copy_(_select_and_weight(own, others, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` by the logits.

    Args:
        input (Tensor): Logits of shape (N, C).
        target (Tensor): As in :func:`sigmoid_focal_loss_forward`.
        weight (Tensor): As in :func:`sigmoid_focal_loss_forward`.
        grad_input (Tensor): Receives the derivative, of shape (N, C).
        gamma (float): Focusing exponent.
        alpha (float): Weight of the positive term.
    """
    prob, log_prob, log_rest = _probabilities(input)
    rest = 1 - prob
    own = -alpha * rest.pow(gamma) * (rest - gamma * prob * log_prob)
    others = -(1 - alpha) * prob.pow(gamma) * (gamma * rest * log_rest - prob)
    grad_input.copy_(_select_and_weight(own, others, target, weight))


def _probabilities(input: Tensor) -> tuple:
    """Sigmoid of the logits and the logarithms of it and of one minus it."""
    prob = _at_least_float32(input).sigmoid()
    tiny = torch.finfo(torch.float32).tiny
    return prob, prob.clamp(min=tiny).log(), (1 - prob).clamp(min=tiny).log()


def _select_and_weight(
    own: Tensor, others: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Take ``own`` at each sample's class and ``others`` elsewhere, then weight."""
    classes = torch.arange(own.shape[1], device=own.device)
    values = torch.where(target[:, None] == classes, own, others)
    return values * weight[target][:, None] if weight.numel() else values
