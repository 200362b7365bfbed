# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A stand-in for ``mmcv._ext``, mmcv's compiled extension.

mmcv from the package index usually has no compiled ops. Then ``import mmcv.ops``, and
so ``import mmdet``, fails with ``No module named 'mmcv._ext'``. :func:`install` makes a
module of this name. With torchvision's kernels and plain PyTorch, it computes the ops
of Mask R-CNN and of common dense detectors, on the CPU and on GPUs. Every other op
raises an error when it is called.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, Callable, Tuple

import torch
from torch import Tensor

_NAME = 'mmcv._ext'


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
            f'{torch.__version__}. To rebuild them:\n{_commands()}',
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
            raise NotImplementedError(_missing_message(f'The op {name!r}'))

        missing.__name__ = name
        return missing


def _commands() -> str:
    """Commands that install compiled mmcv."""
    # Imported here so that nothing else is imported before install().
    from .stack import compiled_mmcv_commands

    return compiled_mmcv_commands()


def _missing_message(what: str) -> str:
    return (
        f"{what} needs mmcv's compiled ops, and this mmcv was installed without them. "
        f'To get them:\n{_commands()}'
    )


def get_compiler_version() -> str:
    """Return 'not compiled', for the environment report of mmcv."""
    return 'not compiled'


def get_compiling_cuda_version() -> str:
    """Return 'not compiled', for the environment report of mmcv."""
    return 'not compiled'


def _torchvision_ops() -> Any:
    """Import torchvision, and return the namespace of its kernels."""
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError) as error:
        # The RuntimeError is "operator torchvision::nms does not exist", of a
        # torchvision for another PyTorch.
        raise ImportError(
            'NMS and RoIAlign need a torchvision for PyTorch '
            f'{torch.__version__}, and importing torchvision failed: {error}. `python '
            '-m mlla_mm.utils.collect_env` names the version to install.'
        ) from error
    return torch.ops.torchvision


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32.

    The kernels do not support bfloat16, and NMS does not support float16 on the CPU.
    Coordinates are also inexact: above 256 in bfloat16 and above 2048 in float16, the
    error reaches a pixel.
    """
    return tensor.float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor


def _as_float32(value: float) -> float:
    """Round a threshold to float32, as compiled mmcv does.

    It matters for overlaps that are equal to the threshold.
    """
    return torch.tensor(value, dtype=torch.float32).item()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels, of shape (N, 4).
        scores (Tensor): Scores of shape (N, ).
        iou_threshold (float): A box is dropped if its IoU with a better box is larger.
        offset (int): 1 if a box is ``x2 - x1 + 1`` pixels wide, 0 if ``x2 - x1``.

    Returns:
        Tensor: Indices of the kept boxes, int64, of shape (K, ), best score first.
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
    """Soft NMS (Bodla et al., ICCV 2017): overlapping boxes get lower scores.

    Boxes are rearranged as in compiled mmcv: the best one is swapped to the front, and
    the last one takes the place of a dropped one. So boxes with equal scores are taken
    in the same order.

    Args:
        boxes (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels, of shape (N, 4), CPU.
        scores (Tensor): Scores of shape (N, ).
        dets (Tensor): Output of shape (N, 5). Its first K rows become the kept boxes
            and their new scores.
        iou_threshold (float): Methods 0 and 1 reduce a score from this IoU on.
        sigma (float): Width of the Gaussian of method 2.
        min_score (float): A box is dropped if its score falls below this.
        method (int): 0 sets the score to 0, 1 multiplies it by ``1 - IoU``, and 2 by
            ``exp(-IoU^2 / sigma)``.
        offset (int): 1 if a box is ``x2 - x1 + 1`` pixels wide, 0 if ``x2 - x1``.

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
    """Factors that soft NMS multiplies the scores by, of shape (N, )."""
    if method == 2:
        return torch.exp(-(overlaps * overlaps) / sigma)
    reduced = 1 - overlaps if method == 1 else torch.zeros_like(overlaps)
    return torch.where(overlaps >= iou_threshold, reduced, torch.ones_like(overlaps))


def _fill_from_the_end(keep: Tensor) -> Tensor:
    """Order of the entries after each dropped one was replaced by the last one.

    Args:
        keep (Tensor): Whether an entry stays, bool, of shape (N, ).

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
        output (Tensor): Output of shape (K, C, aligned_height, aligned_width).
        argmax_y (Tensor): Unused; for max pooling.
        argmax_x (Tensor): Unused; for max pooling.
        aligned_height (int): Number of bins along y.
        aligned_width (int): Number of bins along x.
        spatial_scale (float): Feature pixels per input pixel.
        sampling_ratio (int): Samples per bin along each axis. 0 means one per feature
            pixel.
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
        grad_input (Tensor): The gradient is added to it, of shape (N, C, H, W).
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
        target (Tensor): Class of each sample, int64, of shape (N, ). C means
            background.
        weight (Tensor): Weight of each class, of shape (C, ). Empty means no weights.
            With weights, no sample may be background.
        output (Tensor): Output, the losses, of shape (N, C).
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
        grad_input (Tensor): Output, the derivative, of shape (N, C).
        gamma (float): Focusing exponent.
        alpha (float): Weight of the positive term.
    """
    prob, log_prob, log_rest = _probabilities(input)
    rest = 1 - prob
    own = -alpha * rest.pow(gamma) * (rest - gamma * prob * log_prob)
    others = -(1 - alpha) * prob.pow(gamma) * (gamma * rest * log_rest - prob)
    grad_input.copy_(_select_and_weight(own, others, target, weight))


def _probabilities(input: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """The sigmoid p of the logits, log(p) and log(1 - p)."""
    prob = _at_least_float32(input).sigmoid()
    tiny = torch.finfo(torch.float32).tiny
    return prob, prob.clamp(min=tiny).log(), (1 - prob).clamp(min=tiny).log()


def _select_and_weight(
    own: Tensor, others: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Take ``own`` at each sample's class and ``others`` elsewhere, and weight them."""
    classes = torch.arange(own.shape[1], device=own.device)
    values = torch.where(target[:, None] == classes, own, others)
    return values * weight[target][:, None] if weight.numel() else values
