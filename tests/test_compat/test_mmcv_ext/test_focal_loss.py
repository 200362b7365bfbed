# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from mlla_mm.compat import mmcv_ext

from .shared import DEVICES, HALF, mmcv_ops, needs_stand_in


def focal_case(generator, dtype=torch.float64):
    logits = 4 * torch.randn(30, 5, dtype=dtype, generator=generator)
    target = torch.randint(0, 6, (30,), generator=generator)  # 5 is background
    one_hot = torch.nn.functional.one_hot(target, 6)[:, :5].to(dtype)
    return logits, target, one_hot


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('gamma', [0.0, 1.5, 2.0])
@pytest.mark.parametrize('alpha', [0.25, 0.6])
def test_focal_loss_equals_torchvision(alpha, gamma, device, generator):
    logits, target, one_hot = focal_case(generator)
    logits.requires_grad_()
    expected = sigmoid_focal_loss(logits, one_hot, alpha, gamma)
    expected.sum().backward()

    arguments = (logits.detach().to(device), target.to(device))
    no_weight = torch.zeros(0, device=device)
    loss, grad = torch.empty(2, 30, 5, dtype=torch.float64, device=device)
    mmcv_ext.sigmoid_focal_loss_forward(*arguments, no_weight, loss, gamma, alpha)
    mmcv_ext.sigmoid_focal_loss_backward(*arguments, no_weight, grad, gamma, alpha)
    torch.testing.assert_close(loss.cpu(), expected.detach())
    torch.testing.assert_close(grad.cpu(), logits.grad)


@needs_stand_in
def test_focal_loss_through_mmcv_with_class_weights(generator):
    logits, target, _ = focal_case(generator)
    target = target.clamp(max=4)
    one_hot = torch.nn.functional.one_hot(target, 5).double()
    weight = torch.rand(5, dtype=torch.float64, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = mmcv_ops.sigmoid_focal_loss(ours, target, 2.0, 0.25, weight, 'mean')
    # mmcv weights a sample by its own class and divides by the number of samples.
    expected = sigmoid_focal_loss(theirs, one_hot, 0.25, 2.0) * weight[target][:, None]
    expected = expected.sum() / 30
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_focal_loss_of_extreme_logits_is_finite(dtype):
    logits = torch.tensor([[-200.0, 200.0], [200.0, -200.0]], dtype=dtype)
    target, no_weight = torch.tensor([0, 0]), torch.zeros(0)
    loss, grad = torch.empty(2, 2, 2, dtype=dtype)
    mmcv_ext.sigmoid_focal_loss_forward(logits, target, no_weight, loss, 2.0, 0.25)
    mmcv_ext.sigmoid_focal_loss_backward(logits, target, no_weight, grad, 2.0, 0.25)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert (loss[0] > 20 * 0.25).all()  # both wrong
    assert not loss[1].any()  # both right


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_focal_loss_in_float32_is_exact_where_it_saturates(gamma):
    logits = torch.tensor([[-60.0, 60], [-16.7, 16.7], [10, -10], [3, -3]])
    target = torch.tensor([0, 0, 0, 0])
    loss, grad = sigmoid_loss_and_gradient(logits, target, gamma)
    exact = sigmoid_loss_and_gradient(logits.double(), target, gamma)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(grad.double(), exact[1], rtol=1e-5, atol=1e-12)


def sigmoid_loss_and_gradient(logits, target, gamma):
    logits = logits.clone().requires_grad_()
    one_hot = torch.nn.functional.one_hot(target, 2).to(logits.dtype)
    if logits.dtype == torch.float64:
        loss = sigmoid_focal_loss(logits, one_hot, 0.25, gamma)
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]
    loss, grad = torch.empty_like(logits), torch.empty_like(logits)
    arguments = (logits.detach(), target, torch.zeros(0))
    mmcv_ext.sigmoid_focal_loss_forward(*arguments, loss, gamma, 0.25)
    mmcv_ext.sigmoid_focal_loss_backward(*arguments, grad, gamma, 0.25)
    return loss, grad


# --- Of softmax ---


def plain_softmax_focal_loss(logits, target, gamma, alpha, weight):
    """In the words of the paper, for one sample after the other."""
    losses = []
    for row, label in zip(logits, target.tolist()):
        if label < 0:
            losses.append(0 * row.sum())
            continue
        prob = row.softmax(0)[label]
        losses.append(-alpha * weight[label] * (1 - prob) ** gamma * prob.log())
    return torch.stack(losses)


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize('weighted', [False, True])
def test_softmax_focal_loss_follows_its_definition(weighted, gamma, device, generator):
    logits = 3 * torch.randn(30, 5, dtype=torch.float64, generator=generator)
    target = torch.randint(-1, 5, (30,), generator=generator)  # -1 is ignored
    weight = torch.rand(5, dtype=torch.float64, generator=generator)
    theirs, ours = logits.clone().requires_grad_(), logits.to(device).requires_grad_()
    factors = weight if weighted else torch.ones(5)
    expected = plain_softmax_focal_loss(theirs, target, gamma, 0.3, factors)
    target = target.to(device)
    arguments = (ours, target, gamma, 0.3, weight.to(device) if weighted else None)
    loss = mmcv_ops.softmax_focal_loss(*arguments, 'none')
    torch.testing.assert_close(loss.cpu(), expected)
    assert not loss[target < 0].any()
    mmcv_ops.softmax_focal_loss(*arguments, 'sum').backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


@needs_stand_in
@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_softmax_focal_loss_of_extreme_logits_is_finite(gamma, dtype):
    logits = torch.tensor([[200.0, -200], [-200, 200]], dtype=dtype).requires_grad_()
    target = torch.tensor([0, 0])
    loss = mmcv_ops.softmax_focal_loss(logits, target, gamma, 0.25, None, 'none')
    assert loss.dtype == dtype
    assert loss[0] == 0  # right
    assert 20 < loss[1] < 30  # wrong: the logarithm ends at the smallest number
    loss = mmcv_ops.softmax_focal_loss(logits, target, gamma, 0.25)
    loss.backward()
    assert logits.grad.isfinite().all()


@needs_stand_in
@pytest.mark.parametrize('dtype', HALF)
def test_softmax_focal_loss_in_half_precision(dtype, generator):
    softmax = torch.randn(20, 4, generator=generator).softmax(1).to(dtype)
    target = torch.randint(-1, 4, (20,), generator=generator)
    results = []
    for probabilities in (softmax, softmax.float()):
        loss, buff = torch.zeros(2, 20, dtype=probabilities.dtype)
        grad = torch.zeros_like(probabilities)
        arguments = (probabilities, target, torch.zeros(0))
        mmcv_ext.softmax_focal_loss_forward(*arguments, loss, 2.0, 0.25)
        mmcv_ext.softmax_focal_loss_backward(*arguments, buff, grad, 2.0, 0.25)
        results.append((loss, buff, grad))
    found, expected = results
    for a, b in zip(found, expected):
        assert b.any()
        assert torch.equal(a, b.to(dtype))  # only the results are rounded
