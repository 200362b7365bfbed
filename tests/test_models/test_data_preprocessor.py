# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy

import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample, batch_label_to_onehot, cat_batch_labels

from mlla_mm.models.classifiers import ErasingDataPreprocessor

NORMALISED = dict(
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
    num_classes=7,
)
AUGMENTS = dict(
    augments=[dict(type='mlla_mm.models.classifiers.ReversedMixup', alpha=0.8)]
)
BOX = (3, 5, 20, 11)


def batch(labels=(1, 2, 6), erasing=None) -> dict:
    generator = torch.Generator().manual_seed(0)
    shape = len(labels), 3, 32, 24
    inputs = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    samples = [DataSample().set_gt_label(label) for label in labels]
    for i, value in (erasing or {}).items():
        samples[i].set_metainfo(dict(erasing=value))
    return dict(inputs=inputs, data_samples=samples)


def process(data, training=True, augments=None, **options):
    options = {**NORMALISED, **options}
    processor = ErasingDataPreprocessor(batch_augments=augments, **options)
    return processor(copy.deepcopy(data), training)


@pytest.mark.parametrize('as_list', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_without_erasing_it_is_mmpretrains(training, as_list):
    data = batch()
    if as_list:
        data['inputs'] = [image[:, : 20 + i] for i, image in enumerate(data['inputs'])]
    expected = ClsDataPreprocessor(**NORMALISED)(copy.deepcopy(data), training)
    found = process(data, training)
    assert torch.equal(found['inputs'], expected['inputs'])
    for a, b in zip(found['data_samples'], expected['data_samples']):
        assert torch.equal(a.gt_label, b.gt_label) and 'gt_score' not in a
    # Images alone, as in inference.
    alone = process(dict(inputs=data['inputs']), training)
    assert torch.equal(alone['inputs'], expected['inputs'])


def test_noise_of_a_box():
    erasing = {1: (*BOX, 5), 2: (*BOX, 6)}
    plain = process(batch())['inputs']
    found = process(batch(erasing=erasing))['inputs']
    top, left, height, width = BOX
    inside = torch.zeros(32, 24, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[:, :, ~inside], plain[:, :, ~inside])
    noise = found[1:, :, inside]
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.1
    # Standard normal, every value of its own, not clipped.
    assert noise.unique().numel() == noise.numel() == 2 * 3 * 20 * 11
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert noise.abs().max() > 2.7
    # What the other images are, and where the image is, changes nothing.
    alone = process(batch(labels=(1, 2), erasing={1: (*BOX, 6)}))['inputs']
    assert torch.equal(alone[1][:, inside], noise[1])


def test_nothing_is_erased_in_evaluation():
    data = batch(erasing={0: (*BOX, 5)})
    assert torch.equal(process(data, False)['inputs'], process(batch())['inputs'])


@pytest.mark.parametrize(
    'labels', [(1, 2, 6), ([1, 3], [], [2, 0, 6]), ([1], [2, 2], [0])]
)
def test_scores_are_mmpretrains(labels):
    samples = [
        DataSample().set_gt_label(torch.as_tensor(label, dtype=torch.long).view(-1))
        for label in labels
    ]
    data = dict(inputs=batch()['inputs'], data_samples=samples)
    np.random.seed(0)
    ratio = np.random.beta(0.8, 0.8)
    expected = batch_label_to_onehot(
        *cat_batch_labels([sample.gt_label for sample in samples]), 7
    ).clamp(max=1)
    mixed = ratio * expected + (1 - ratio) * expected.flip(0)
    np.random.seed(0)
    found = process(data, augments=AUGMENTS)['data_samples']
    scores = torch.stack([sample.gt_score for sample in found])
    assert torch.allclose(scores, mixed.float(), atol=1e-6)


def test_mixes_after_erasing():
    data = batch(erasing={0: (*BOX, 5)})
    np.random.seed(0)
    ratio = np.random.beta(0.8, 0.8)
    erased = process(data)['inputs']
    np.random.seed(0)
    found = process(data, augments=AUGMENTS)['inputs']
    assert torch.allclose(found, ratio * erased + (1 - ratio) * erased.flip(0))


def test_given_scores_are_mixed():
    data = batch()
    for i, sample in enumerate(data['data_samples']):
        sample.set_gt_score(torch.eye(7)[i] * 0.5 + 0.1)
    found = process(data, augments=AUGMENTS)['data_samples']
    assert float(found[1].gt_score[1]) == pytest.approx(0.6)  # its own mirror


def test_evaluation_makes_no_scores():
    found = process(batch(), False, augments=AUGMENTS)['data_samples']
    assert not any('gt_score' in sample for sample in found)


def test_a_label_that_is_no_class():
    with pytest.raises(ValueError, match='label 9.*num_classes is 7'):
        process(batch(labels=(1, 9, 2)), augments=AUGMENTS)
    with pytest.raises(ValueError, match='num_classes'):
        process(batch(), augments=AUGMENTS, num_classes=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    """As on the CPU, but for the noise, which depends on the seed alone."""
    erasing = {1: (*BOX, 5), 2: (*BOX, 5)}
    data = batch(erasing=erasing)
    options = dict(NORMALISED, batch_augments=AUGMENTS)
    processor = ErasingDataPreprocessor(**options).to('cuda')
    np.random.seed(0)
    expected = process(data, augments=AUGMENTS)
    found = []
    for _ in range(2):
        np.random.seed(0)
        found.append(processor(copy.deepcopy(data), True))
    first, second = (x['inputs'] for x in found)
    assert first.is_cuda and torch.equal(first, second)
    top, left, height, width = BOX
    kept = torch.ones(32, 24, dtype=torch.bool)
    kept[top : top + height, left : left + width] = False
    torch.testing.assert_close(
        first.cpu()[:, :, kept], expected['inputs'][:, :, kept], rtol=1e-5, atol=1e-6
    )
    scores = [x.gt_score.cpu() for x in found[0]['data_samples']]
    for score, sample in zip(scores, expected['data_samples']):
        torch.testing.assert_close(score, sample.gt_score)
    plain = ErasingDataPreprocessor(**NORMALISED).to('cuda')(data, True)['inputs']
    noise = plain[1:, :, ~kept.cuda()]
    assert torch.equal(*noise) and abs(noise.std() - 1) < 0.1
