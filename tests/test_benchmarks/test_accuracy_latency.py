# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import cv2
import pytest
from torch import nn

from benchmarks import accuracy_latency as al
from benchmarks.meter import Meter
from benchmarks.plots import plot_accuracy_latency

pytest.importorskip('mmpretrain')


@pytest.mark.parametrize('name', al.DEFAULT_MODELS)
def test_every_default_model_is_known(name):
    candidate = al.find_candidate(name)
    assert 80 < candidate.top1 < 86
    assert (candidate.family == 'MLLA') == name.startswith('mlla')


@pytest.mark.parametrize(
    'name, parameters',
    [('mlla-t_8xb128_in1k', 24_392_200), ('swin-tiny_16xb64_in1k', 28_288_354)],
)
def test_models_are_those_of_the_names(name, parameters):
    model = al.find_candidate(name).build()
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_names_without_a_figure():
    with pytest.raises(ValueError, match='Failed to find model "swin-huge"'):
        al.find_candidate('swin-huge')
    with pytest.raises(ValueError, match='No Top 1 Accuracy is published'):
        al.find_candidate('mask-rcnn_mlla-t_fpn_1x_coco')


def test_families_are_those_of_the_metafiles():
    candidate = al.find_candidate('la-swin-t_rope_8xb128_in1k')
    assert candidate[:3] == (candidate.name, 'LinearAttentionSwin', 80.0)


def candidate(name, family, top1, width):
    return al.Candidate(name, family, top1, lambda: nn.Conv2d(3, width, 3).eval())


@pytest.fixture(scope='module')
def measured():
    candidates = [
        candidate('mlla-t_x', 'MLLA', 83.5, 4),
        candidate('other-tiny_x', 'Other', 81.0, 2),
        candidate('other-small_x', 'Other', 82.0, 8),
    ]
    return al.measure_candidates(candidates, Meter('cpu', 3), 2, (32, 32))


def test_measured(measured):
    assert [point.parameters for point in measured] == [112, 56, 224]
    for point in measured:
        low, high = point.quartiles
        assert 0 < low <= point.latency <= high < 1000
    table = al.format_measured(measured).splitlines()
    assert 'mlla-t_x' in table[2] and '83.5' in table[2]


def test_unsteady_measurements_are_named(measured):
    steady = measured[0]._replace(latency=10.0, quartiles=(9.8, 10.2))
    unsteady = measured[1]._replace(latency=10.0, quartiles=(9.0, 14.0))
    assert 'Unsteady' not in al.format_measured([steady])
    note = al.format_measured([steady, unsteady]).splitlines()[-1]
    assert 'other-tiny_x' in note and 'mlla-t_x' not in note


def test_picture(measured, tmp_path):
    plot_accuracy_latency(measured, 'a CPU', tmp_path / 'a.png')
    picture = cv2.imread(str(tmp_path / 'a.png'))
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture.std() > 10


def test_errors(measured):
    one = [candidate('a', 'A', 80.0, 1)]
    with pytest.raises(ValueError, match='must be positive, got 0'):
        al.measure_candidates(one, Meter('cpu'), 0)
    with pytest.raises(ValueError, match=r'a does not run on images \(1, 3, 2, 9\)'):
        al.measure_candidates(one, Meter('cpu'), 1, (2, 9))
