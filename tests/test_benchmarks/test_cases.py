# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest

from benchmarks.cases import MODES, Case, make_cases, make_sweep


def test_cases_are_combinations():
    cases = make_cases(['classification', '64x96'], [8, 2], MODES, ['float32'])
    assert cases == [
        Case('classification', (224, 224), 8, 'infer', 'float32'),
        Case('classification', (224, 224), 8, 'train', 'float32'),
        Case('backbone', (64, 96), 2, 'infer', 'float32'),
        Case('backbone', (64, 96), 2, 'train', 'float32'),
    ]
    detection, segmentation = make_cases(['detection', 'segmentation'], [4])
    assert detection == Case('detection', (800, 1280), 4, 'infer', 'float32')
    assert segmentation.batch_size == 4
    assert str(detection) == 'detection 800x1280, batch 4, infer, float32'
    assert detection.num_tokens == 200 * 320
    assert Case('backbone', (5, 9), 1).num_tokens == 2 * 3


@pytest.mark.parametrize(
    'make, arguments, message',
    [
        (make_cases, [['224']], "HEIGHTxWIDTH, got '224'"),
        (make_cases, [['0x32']], "HEIGHTxWIDTH, got '0x32'"),
        (make_cases, [['32x32'], [0]], 'got 0'),
        (make_cases, [['32x32', '64x64', '9x9'], [1, 2]], 'all 3 shapes, .* got 1 2'),
        (make_sweep, [[224]], 'two or more different positive sides'),
        (make_sweep, [[64, 64]], 'two or more different positive sides'),
        (make_sweep, [[0, 64]], 'two or more different positive sides'),
    ],
)
def test_errors(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)
