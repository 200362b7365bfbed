# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import importlib.util
import math
import sys

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from mlla_mm.compat import mmcv_ext

mmcv_ext.install()
mmcv_ops = pytest.importorskip('mmcv.ops')

needs_stand_in = pytest.mark.skipif(
    not mmcv_ext.is_stand_in(), reason='mmcv is compiled here'
)
needs_compiled = pytest.mark.skipif(
    mmcv_ext.is_stand_in(), reason='mmcv is not compiled here'
)
DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def extension():
    return importlib.import_module('mmcv._ext')


def random_boxes(number, generator, size=100.0):
    corners = torch.rand(number, 2, generator=generator) * size
    sides = 1 + torch.rand(number, 2, generator=generator) * size / 2
    return torch.cat([corners, corners + sides], dim=1)


def plain_iou(a, b, offset):
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    intersection = max(width, 0) * max(height, 0)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    return intersection / (area_a + area_b - intersection)


# --- Non-maximum suppression ---


def plain_nms(boxes, scores, iou_threshold, offset):
    boxes, scores = boxes.tolist(), scores.tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(plain_iou(boxes[i], boxes[j], offset) <= iou_threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('iou_threshold', [0.0, 0.3, 0.7, 1.0])
def test_nms_follows_its_definition(iou_threshold, offset, device, generator):
    boxes = random_boxes(200, generator)
    scores = torch.rand(200, generator=generator)
    kept = mmcv_ext.nms(boxes.to(device), scores.to(device), iou_threshold, offset)
    assert kept.tolist() == plain_nms(boxes, scores, iou_threshold, offset)
    dets, indices = mmcv_ops.nms(boxes, scores, iou_threshold, offset=offset)
    assert indices.tolist() == kept.tolist()
    torch.testing.assert_close(dets[:, :4], boxes[indices])


def test_nms_offset_decides_touching_boxes():
    # 10 and 9 pixels wide with offset 0, 11 and 10 with offset 1.
    boxes = torch.tensor([[0.0, 0, 10, 0], [1, 0, 10, 0]])
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_ext.nms(boxes, scores, 0.5, 0).tolist() == [0, 1]  # no area
    assert mmcv_ext.nms(boxes, scores, 0.5, 1).tolist() == [0]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_of_nothing(offset, device):
    boxes, scores = torch.zeros(0, 4, device=device), torch.zeros(0, device=device)
    kept = mmcv_ext.nms(boxes, scores, 0.5, offset)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize('device', DEVICES)
def test_nms_keeps_the_first_of_equal_scores(device):
    boxes = torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]]).repeat(20, 1)
    kept = mmcv_ext.nms(boxes.to(device), torch.full((40,), 0.5, device=device), 0.5, 0)
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize('tenths', [1, 3, 6, 7, 9])
def test_nms_keeps_an_overlap_equal_to_the_threshold(tenths):
    # The shorter box covers exactly this part of the longer one. In float32 the IoU
    # equals the rounded threshold, which may lie below or above the decimal number.
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, tenths, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_ext.nms(boxes, scores, tenths / 10, 0).tolist() == [0, 1]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALF)
def test_nms_in_half_precision(dtype, device, generator):
    boxes = random_boxes(50, generator).to(dtype)
    scores = (torch.randperm(50, generator=generator) / 64).to(dtype)
    kept = mmcv_ext.nms(boxes.to(device), scores.to(device), 0.5, 1)
    assert kept.tolist() == plain_nms(boxes.float(), scores.float(), 0.5, 1)


# --- Soft NMS ---


def plain_soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, offset):
    left = dict(enumerate(scores.tolist()))
    boxes = boxes.tolist()
    kept, kept_scores = [], []
    while left:
        best = max(left, key=left.get)
        kept.append(best)
        kept_scores.append(left.pop(best))
        for i in list(left):
            iou = plain_iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                left[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= iou_threshold:
                left[i] *= 1 - iou if method == 'linear' else 0
            if left[i] < min_score:
                del left[i]
    return kept, kept_scores


METHODS = ['naive', 'linear', 'gaussian']


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('min_score', [0.0, 0.05, 0.3])
def test_soft_nms_follows_its_definition(min_score, method, offset, generator):
    boxes = random_boxes(100, generator)
    scores = torch.rand(100, generator=generator)
    settings = (0.3, 0.5, min_score, method, offset)
    dets, indices = mmcv_ops.soft_nms(boxes, scores, *settings)
    kept, kept_scores = plain_soft_nms(boxes, scores, *settings)
    if min_score == 0 and method == 'naive':
        # The suppressed ones stay with score 0, in no particular order.
        number = sum(score > 0 for score in kept_scores)
        assert len(indices) == len(boxes)
        assert (dets[number:, 4] == 0).all()
        dets, indices = dets[:number], indices[:number]
        kept, kept_scores = kept[:number], kept_scores[:number]
    assert indices.tolist() == kept
    torch.testing.assert_close(dets[:, :4], boxes[indices])
    torch.testing.assert_close(dets[:, 4], torch.tensor(kept_scores))


def test_soft_nms_leaves_its_input_alone(generator):
    boxes = random_boxes(20, generator)
    scores = torch.rand(20, generator=generator)
    before = boxes.clone(), scores.clone()
    mmcv_ext.softnms(boxes, scores, boxes.new_empty(20, 5), 0.3, 0.5, 0.01, 1, 0)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


def test_soft_nms_of_nothing():
    boxes, scores, dets = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5)
    kept = mmcv_ext.softnms(boxes, scores, dets, 0.3, 0.5, 0.01, 1, 0)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


# --- RoIAlign ---


def interpolation_matrix(start, length, bins, samples, size):
    """Averages linear interpolation at the samples of each bin: (bins, size)."""
    matrix = torch.zeros(bins, size, dtype=torch.float64)
    for row in range(bins):
        for sample in range(samples):
            position = start + (row + (sample + 0.5) / samples) * length / bins
            if not -1 <= position <= size:
                continue
            position = min(max(position, 0), size - 1)
            low = min(int(position), max(size - 2, 0))
            matrix[row, low] += (1 - (position - low)) / samples
            if size > 1:
                matrix[row, low + 1] += (position - low) / samples
    return matrix


def plain_roi_align(features, rois, bins, scale, sampling_ratio, aligned):
    """RoIAlign is separable: a matrix along y and one along x."""
    output = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - 0.5 * aligned for corner in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        along_y, along_x = (
            interpolation_matrix(
                start, length, n, sampling_ratio or math.ceil(length / n), size
            )
            for start, length, n, size in zip(
                (y1, x1), (height, width), bins, features.shape[2:]
            )
        )
        output.append(along_y @ features[int(image)] @ along_x.T)
    shape = (0, features.shape[1], *bins)
    return torch.stack(output) if output else features.new_zeros(shape)


ROIS = {
    'inside': [[0, 3, 2, 40, 30], [1, 10.3, 5.7, 33.1, 50.9], [0, 0, 0, 63, 47]],
    'partly outside': [[0, -20, -30, 25, 25], [1, 50, 30, 100, 90]],
    'outside': [[0, 200, 200, 240, 260], [1, -90, -80, -40, -40]],
    'tiny': [[0, 8, 8, 8, 8], [1, 20.2, 20.2, 20.7, 20.4]],
    'none': [],
}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('place', ROIS)
def test_roi_align_follows_its_definition(
    place, sampling_ratio, aligned, device, generator
):
    if place == 'tiny' and aligned and sampling_ratio == 0:
        pytest.skip('a RoI without area has no samples')
    rois = torch.tensor(ROIS[place], dtype=torch.float64).view(-1, 5)
    features = torch.randn(2, 3, 12, 16, dtype=torch.float64, generator=generator)
    features.requires_grad_()
    expected = plain_roi_align(features, rois, (3, 5), 0.25, sampling_ratio, aligned)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (expected_grad,) = torch.autograd.grad(
        (expected * weights).sum() + 0 * features.sum(), features
    )

    on_device = features.detach().to(device).requires_grad_()
    output = mmcv_ops.roi_align(
        on_device, rois.to(device), (3, 5), 0.25, sampling_ratio, 'avg', aligned
    )
    output.backward(weights.to(device))
    torch.testing.assert_close(output.cpu(), expected)
    torch.testing.assert_close(on_device.grad.cpu(), expected_grad)
    if place == 'outside':
        assert not output.any()
        assert not on_device.grad.any()


def test_roi_align_without_area_gives_zeros():
    features = torch.ones(1, 2, 8, 8)
    output = mmcv_ops.roi_align(features, torch.tensor([[0.0, 4, 4, 4, 4]]), 2)
    assert torch.equal(output, torch.zeros(1, 2, 2, 2))


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALF)
def test_roi_align_in_half_precision(dtype, device, generator):
    features = torch.randn(1, 4, 64, 64, generator=generator).to(dtype)
    rois = torch.tensor([[0, 3.25, 17, 900, 601], [0, 100, 100, 131, 160]])
    expected, expected_grad = roi_align_and_gradient(features.float(), rois)
    output, grad = roi_align_and_gradient(features.to(device), rois.to(device))
    assert output.dtype == grad.dtype == dtype
    tolerance = {'rtol': torch.finfo(dtype).eps, 'atol': 1e-6}
    torch.testing.assert_close(output.float().cpu(), expected, **tolerance)
    torch.testing.assert_close(grad.float().cpu(), expected_grad, **tolerance)


def roi_align_and_gradient(features, rois):
    features = features.clone().requires_grad_()
    output = mmcv_ops.roi_align(features, rois, 7, 1 / 16, 0, 'avg', True)
    output.sum().backward()
    return output.detach(), features.grad


def test_roi_align_backward_adds():
    grad_output = torch.ones(1, 1, 2, 2)
    rois = torch.tensor([[0.0, 0, 0, 4, 4]])
    empty = torch.zeros(0)
    grad_input = torch.full((1, 1, 4, 4), 3.0)
    mmcv_ext.roi_align_backward(
        grad_output, rois, empty, empty, grad_input, 2, 2, 1.0, 2, 1, True
    )
    # The four bins cover the 16 pixels evenly: a quarter of a gradient each.
    torch.testing.assert_close(grad_input, torch.full((1, 1, 4, 4), 3.25))


@needs_stand_in
def test_max_pooling_needs_compiled_mmcv():
    rois = torch.tensor([[0.0, 0, 0, 4, 4]])
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'[\s\S]*pip install"):
        mmcv_ops.roi_align(torch.ones(1, 1, 4, 4), rois, 2, 1.0, 0, 'max', True)


# --- Focal loss ---


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


# --- The module ---


@needs_stand_in
def test_unknown_op_says_what_to_do():
    for name in ('ms_deform_attn_forward', 'softmax_focal_loss_forward'):
        op = getattr(extension(), name)
        with pytest.raises(NotImplementedError) as error:
            op(torch.zeros(1), scale=2)
        assert name in str(error.value)
        assert '--no-build-isolation' in str(error.value)


@needs_stand_in
def test_dunder_names_are_not_ops():
    assert not hasattr(extension(), '__path__')
    assert not hasattr(extension(), '__all__')


@needs_stand_in
def test_stand_in_has_a_spec():
    spec = importlib.util.find_spec('mmcv._ext')
    assert spec.name == 'mmcv._ext'
    assert spec.loader is not None  # mmcv's check_ops_exist asks for it
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert mmcv_full_available()


@needs_stand_in
def test_environment_report_of_mmcv():
    from mmcv.utils import collect_env

    report = collect_env()
    assert report['PyTorch'] == torch.__version__
    assert report['MMCV Compiler'] == 'not compiled'
    assert report['MMCV CUDA Compiler'] == 'not compiled'


@needs_stand_in
def test_installing_again_changes_nothing():
    module = sys.modules['mmcv._ext']
    assert mmcv_ext.install()
    assert sys.modules['mmcv._ext'] is module


@needs_compiled
def test_compiled_extension_stays():
    assert not mmcv_ext.install()
    assert importlib.util.find_spec('mmcv._ext').origin.endswith('.so')


@pytest.fixture
def other_mmcv(tmp_path, monkeypatch):
    """Another package mmcv, found first; gives its folder."""
    for name in [n for n in sys.modules if n.split('.')[0] == 'mmcv']:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    return package


def test_steps_aside_for_an_extension_that_loads(other_mmcv):
    (other_mmcv / '_ext.py').write_text('nms = 1')
    assert not mmcv_ext.install()
    assert not mmcv_ext.is_stand_in()
    assert extension().nms == 1


def test_replaces_an_extension_that_does_not_load(other_mmcv):
    (other_mmcv / '_ext.py').write_text('raise ImportError("undefined symbol: _ZN2at")')
    with pytest.warns(UserWarning, match='undefined symbol: _ZN2at'):
        assert mmcv_ext.install()
    assert mmcv_ext.is_stand_in()


def test_stands_in_where_there_is_no_extension(other_mmcv):
    assert mmcv_ext.install()
    assert extension().nms is mmcv_ext.nms


def test_does_nothing_without_mmcv(other_mmcv, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    assert not mmcv_ext.install()
    assert 'mmcv._ext' not in sys.modules


# --- Against compiled mmcv ---


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('iou_threshold', [0.1, 0.3, 0.5, 0.7])
def test_nms_equals_compiled(iou_threshold, offset, generator):
    # Whole pixels give many overlaps that equal a threshold. The scores are distinct:
    # compiled mmcv sorts with an unstable sort, ours keeps the first of equal scores.
    boxes = random_boxes(400, generator, size=20.0).round()
    scores = torch.randperm(400, generator=generator) / 400
    expected = extension().nms(boxes, scores, iou_threshold, offset)
    assert torch.equal(mmcv_ext.nms(boxes, scores, iou_threshold, offset), expected)


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', range(3))
@pytest.mark.parametrize('min_score', [0.0, 0.05, 0.3])
def test_softnms_equals_compiled(min_score, method, offset, generator):
    boxes = random_boxes(200, generator, size=20.0).round()
    scores = torch.randint(1, 20, (200,), generator=generator) / 20
    settings = (0.3, 0.5, min_score, method, offset)
    dets, expected_dets = torch.zeros(2, 200, 5)
    kept = mmcv_ext.softnms(boxes, scores, dets, *settings)
    expected = extension().softnms(boxes, scores, expected_dets, *settings)
    torch.testing.assert_close(dets[: len(kept)], expected_dets[: len(expected)])
    # Gaussian weights may differ in the last bit, and with them the order of ties.
    assert sorted(kept.tolist()) == sorted(expected.tolist())
    if method != 2:
        assert torch.equal(kept, expected)


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_equals_compiled(sampling_ratio, aligned, dtype, generator):
    features = torch.randn(2, 3, 25, 32, dtype=dtype, generator=generator)
    boxes = random_boxes(100, generator, size=128.0).to(dtype) - 10
    images = torch.randint(0, 2, (100, 1), generator=generator).to(dtype)
    rois = torch.cat([images, boxes], dim=1)
    grad_output = torch.randn(100, 3, 7, 7, dtype=dtype, generator=generator)
    empty = torch.zeros(0, dtype=dtype)
    settings = (7, 7, 0.25, sampling_ratio, 1, aligned)
    results = []
    for ops in (mmcv_ext, extension()):
        output, grad = torch.zeros_like(grad_output), torch.zeros_like(features)
        ops.roi_align_forward(features, rois, output, empty, empty, *settings)
        ops.roi_align_backward(grad_output, rois, empty, empty, grad, *settings)
        results.append((output, grad))
    torch.testing.assert_close(results[0], results[1])
