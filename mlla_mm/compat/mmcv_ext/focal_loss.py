# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Focal loss (Lin et al., ICCV 2017) of sigmoid and softmax."""

from typing import Tuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .common import at_least_float32


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    r"""Focal loss of every sample and class.

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
    logits = at_least_float32(input)
    # 1 - p would be 0 in float32 from logits of 17 on.
    prob, rest = logits.sigmoid(), (-logits).sigmoid()
    own = -alpha * rest.pow(gamma) * logsigmoid(logits)
    others = -(1 - alpha) * prob.pow(gamma) * logsigmoid(-logits)
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
    logits = at_least_float32(input)
    prob, rest = logits.sigmoid(), (-logits).sigmoid()
    own = -alpha * rest.pow(gamma) * (rest - gamma * prob * logsigmoid(logits))
    others = (1 - alpha) * prob.pow(gamma) * (prob - gamma * rest * logsigmoid(-logits))
    grad_input.copy_(_select_and_weight(own, others, target, weight))


def _select_and_weight(
    own: Tensor, others: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Take ``own`` at each sample's class and ``others`` elsewhere, and weight them."""
    classes = torch.arange(own.shape[1], device=own.device)
    values = torch.where(target[:, None] == classes, own, others)
    return values * weight[target][:, None] if weight.numel() else values


def softmax_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    r"""Focal loss of every sample, :math:`-\alpha (1 - p)^\gamma \log p`.

    Args:
        input (Tensor): Softmax of the logits, of shape (N, C).
        target (Tensor): Class of each sample, whose probability is p, int64, of shape
            (N, ). Negative means that the sample is ignored: its loss is 0.
        weight (Tensor): Weight of each class, of shape (C, ). Empty means no weights.
        output (Tensor): Output, the losses, of shape (N, ).
        gamma (float): Focusing exponent.
        alpha (float): Weight of all losses.
    """
    prob, rest = _own_probability(input, target)
    losses = -alpha * rest.pow(gamma) * prob.log()
    output.copy_(_ignore_and_weight(losses, target, weight))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    r"""Derivative of :func:`softmax_focal_loss_forward` by the logits.

    By the logit of class c it is :math:`p \frac{dL}{dp} (\delta_c - p_c)`, where
    :math:`\delta_c` is 1 for the sample's own class and 0 for the others.

    Args:
        input (Tensor): Softmax of the logits, of shape (N, C).
        target (Tensor): As in :func:`softmax_focal_loss_forward`.
        weight (Tensor): As in :func:`softmax_focal_loss_forward`.
        buff (Tensor): Output, the factor before the brackets, of shape (N, ).
        grad_input (Tensor): Output, the derivative, of shape (N, C).
        gamma (float): Focusing exponent.
        alpha (float): Weight of all losses.
    """
    prob, rest = _own_probability(input, target)
    slopes = alpha * (gamma * rest.pow(gamma - 1) * prob * prob.log() - rest.pow(gamma))
    factors = _ignore_and_weight(slopes, target, weight)
    buff.copy_(factors)
    classes = torch.arange(input.shape[1], device=input.device)
    is_own = (target[:, None] == classes).to(factors.dtype)
    grad_input.copy_(factors[:, None] * (is_own - input))


def _own_probability(softmax: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    """The probability p of each sample's class, and 1 - p, both positive."""
    prob = at_least_float32(softmax).gather(1, target.clamp(min=0)[:, None])[:, 0]
    # log(0) and 0 to the power of gamma - 1 would be infinite.
    tiny = torch.finfo(torch.float32).tiny
    return prob.clamp(min=tiny), (1 - prob).clamp(min=tiny)


def _ignore_and_weight(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Set the values of ignored samples to 0, and weight the others by class."""
    if weight.numel():
        values = values * weight[target.clamp(min=0)]
    return values.masked_fill(target < 0, 0)
