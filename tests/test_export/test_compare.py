# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Files that are not the model are refused, whatever is wrong with them."""

import copy

import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from mlla_mm.export import (
    ExportedModel,
    ExportError,
    Options,
    export_model,
    whole_model,
)
from mlla_mm.export.compare import compare_predictions, match_detections
from mlla_mm.export.formats import texts

from .. import decisive

TRACE = Options((64, 96))


class Changed(nn.Module):
    """A model with other inputs or outputs."""

    def __init__(self, module, inputs=None, outputs=None):
        super().__init__()
        self.module, self.inputs, self.outputs = module, inputs, outputs

    def forward(self, images, *settings):
        if self.inputs is not None:
            images, *settings = self.inputs(images, *settings)
        found = self.module(images, *settings)
        return found if self.outputs is None else tuple(self.outputs(*found))


def inputs(change):
    return lambda module: Changed(module, inputs=change)


def outputs(change):
    return lambda module: Changed(module, outputs=change)


def weights(name, change):
    """A model with another parameter."""

    def make(module):
        parameter = module.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(change(parameter))
        return module

    return make


def not_normalised(module):
    module.before.normalize = False
    return module


def fixed_limits(module):
    """A detector whose boxes end where the images of the trace did."""
    height, width = TRACE.shape
    sides = torch.tensor([width, height, width, height])
    module.detect = Changed(
        module.detect, inputs=lambda x, limits, threshold: (x, sides.float(), threshold)
    )
    return module


def keep(change):
    """Detections with other places."""
    return outputs(lambda *found: [x[change(len(x))] for x in found])


def check_refused(part, make, message):
    """Compare a model with one that is wrong, as if that were its file."""
    wrong = make(copy.deepcopy(part.module)).eval()
    exported = ExportedModel(
        wrong, list(part.outputs), texts(part.metadata), part.reverse_channels
    )
    with pytest.raises(ExportError, match=message):
        compare_predictions(part.model, exported, TRACE.shape)


def whole(model, task):
    return whole_model(model, task, reverse_channels=True, metadata={})


@pytest.fixture(scope='module')
def detector():
    pytest.importorskip('mmdet')
    return whole(decisive.detector(), 'detection')


@pytest.fixture(scope='module')
def segmentor():
    pytest.importorskip('mmseg')
    return whole(decisive.segmentor(), 'segmentation')


@pytest.fixture(scope='module')
def classifier():
    pytest.importorskip('mmpretrain')
    return whole(decisive.classifier(), 'classification')


IMAGES = {
    'channels in another order': inputs(lambda x, *rest: (x.flip(1), *rest)),
    'not normalised': not_normalised,
    'brighter': inputs(lambda x, *rest: (x + 1, *rest)),
    'mirrored': inputs(lambda x, *rest: (x.flip(-1), *rest)),
    'one pixel to the right': inputs(lambda x, *rest: (x.roll(1, -1), *rest)),
}
DETECTIONS = {
    'boxes moved': outputs(lambda boxes, *rest: (boxes + 0.1, *rest)),
    'boxes stretched': outputs(lambda boxes, *rest: (boxes * 1.002, *rest)),
    'scores larger': outputs(
        lambda boxes, scores, *rest: (boxes, scores * 1.001, *rest)
    ),
    'classes in another order': outputs(
        lambda boxes, scores, labels, masks: (boxes, scores, 2 - labels, masks)
    ),
    'first missing': keep(lambda n: slice(1, None)),
    'last missing': keep(lambda n: slice(0, -1)),
    'one twice': keep(lambda n: torch.tensor([0, *range(n)][:n])),
    'one more': outputs(lambda *found: [torch.cat([x[:1], x]) for x in found]),
    'masks moved': outputs(lambda *found: (*found[:-1], found[-1].roll(1, -1))),
    'masks mixed up': outputs(lambda *found: (*found[:-1], found[-1].flip(0))),
    'masks upside down': outputs(lambda *found: (*found[:-1], found[-1].flip(1))),
    'a threshold of its own': inputs(lambda x, threshold: (x, 0 * threshold + 0.05)),
    'no number': outputs(lambda boxes, *rest: (boxes * float('nan'), *rest)),
    'a weight': weights('detect.model.roi_head.bbox_head.fc_cls.bias', lambda x: x + x),
    'a weight of the RPN': weights(
        'detect.model.rpn_head.rpn_reg.bias', lambda x: x + 0.05
    ),
}


DETECTIONS['sizes of the trace'] = fixed_limits
LABEL_MAPS = {
    'classes in another order': outputs(lambda labels: [3 - labels]),
    'moved by a pixel': outputs(lambda labels: [labels.roll(1, -1)]),
    'a wrong pixel row': outputs(
        lambda labels: [torch.cat([labels[:, :-1], 3 - labels[:, -1:]], 1)]
    ),
    'the size of the image': inputs(lambda x, size: (x, 0 * size)),
    'no class of the model': outputs(lambda labels: [labels - 1]),
    'those of the first image': outputs(lambda labels: [labels[:1].expand_as(labels)]),
    'a weight': weights('model.decode_head.conv_seg.bias', lambda x: x + x.roll(1)),
}
CLASSES = {
    'classes in another order': outputs(lambda scores: [scores.flip(-1)]),
    'logits': outputs(lambda scores: [scores.log()]),
    'no number': outputs(lambda scores: [scores * float('nan')]),
    'divided among the images': outputs(lambda scores: [scores / len(scores)]),
    'a weight': weights('model.head.fc.bias', lambda x: x + x.roll(1) + 0.1),
}


def cases(changes):
    return [pytest.param(make, id=name) for name, make in changes.items()]


@pytest.mark.parametrize('make', cases({**IMAGES, **DETECTIONS}))
def test_detector(detector, make):
    check_refused(detector, make, 'exported model')


@pytest.mark.parametrize('make', cases({**IMAGES, **LABEL_MAPS}))
def test_segmentor(segmentor, make):
    check_refused(segmentor, make, "exported model's labels")


# Its mean over the pixels hardly tells where they were, or a grey level.
IMAGES_OF_CLASSES = {
    name: IMAGES[name] for name in ('channels in another order', 'not normalised')
}


@pytest.mark.parametrize('make', cases({**IMAGES_OF_CLASSES, **CLASSES}))
def test_classifier(classifier, make):
    check_refused(classifier, make, "exported model's scores")


def test_channels_of_the_config(classifier):
    """That a model reverses them, and the file does not, is found as well."""
    part = classifier._replace(reverse_channels=False)
    check_refused(part, lambda module: module, "exported model's scores")


def test_a_wrong_file_is_not_left(classifier, tmp_path):
    module = CLASSES['a weight'](copy.deepcopy(classifier.module))
    wrong = classifier._replace(module=module)
    with pytest.raises(ExportError, match="exported model's scores"):
        export_model(wrong, 'torchscript', tmp_path / 'model.pt', TRACE)
    assert list(tmp_path.iterdir()) == []


def test_options_are_restored(detector, tmp_path):
    """The comparison leaves the model's thresholds as they were."""
    before = copy.deepcopy(detector.model.roi_head.test_cfg)
    export_model(detector, 'torchscript', tmp_path / 'model.pt', TRACE)
    assert detector.model.roi_head.test_cfg == before


# The comparison of detections by itself: what rounding may decide, and what not.

FULL = 4


def detections(scores, boxes=None, labels=None):
    number = len(scores)
    corner = 20.0 * torch.arange(number)[:, None]
    usual = torch.cat([corner, corner, corner + 9, corner + 9], 1)
    return InstanceData(
        scores=torch.tensor(scores),
        bboxes=usual if boxes is None else boxes,
        labels=torch.zeros(number, dtype=torch.long) if labels is None else labels,
    )


@pytest.mark.parametrize(
    'expected, found',
    [
        ([], []),
        ([0.9, 0.8], [0.9, 0.8]),
        # One that is at the threshold of 0.5.
        ([0.9, 0.50005], [0.9]),
        ([0.9], [0.9, 0.50005]),
        # Full lists, whose last place has two that are almost the same.
        ([0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7]),
    ],
)
def test_rounding_may_decide(expected, found):
    match_detections(detections(expected), detections(found), 0.5, FULL, (100, 100))


@pytest.mark.parametrize(
    'expected, found',
    [
        ([], [0.9]),
        ([0.9], []),
        ([0.9, 0.8], [0.9]),
        ([0.9], [0.9, 0.8]),
        # Below the threshold.
        ([0.9], [0.9, 0.4]),
        ([0.9, 0.8], [0.9, 0.7998]),
    ],
)
def test_rounding_does_not_decide(expected, found):
    with pytest.raises(ExportError, match='detections of the exported model differ'):
        match_detections(detections(expected), detections(found), 0.5, FULL, (9, 9))


def test_each_detection_has_one_partner():
    """Two of one place are not both the one that there should be."""
    boxes = torch.tensor([[0.0, 0, 9, 9]] * 2)
    one = detections([0.9], boxes[:1])
    two = detections([0.9, 0.9], boxes)
    match_detections(two, two, 0.5, FULL, (9, 9))
    with pytest.raises(ExportError, match='1 of 2 that the file finds'):
        match_detections(one, two, 0.5, FULL, (9, 9))


def test_order_of_scores():
    right = detections([0.9, 0.8])
    with pytest.raises(ExportError, match='not in the order of their scores'):
        match_detections(right, right[[1, 0]], 0.5, FULL, (9, 9))
