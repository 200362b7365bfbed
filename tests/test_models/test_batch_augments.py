# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')
from mmpretrain.models.losses import LabelSmoothLoss

from mlla_mm.models.classifiers import ReversedCutMix, ReversedMixup

from ..reference import DATA, array

GOLDEN = np.load(DATA / 'training' / 'preprocessing.npz')


@pytest.mark.parametrize(
    'name, augment',
    [('mixup', ReversedMixup(alpha=0.8)), ('cutmix', ReversedCutMix(alpha=1.0))],
)
def test_the_authors_batches(name, augment, monkeypatch):
    """timm's Mixup of the recipe, for a given mixing ratio and box."""
    ratio = float(GOLDEN['mixing_lambda'])
    monkeypatch.setattr('numpy.random.beta', lambda *args: ratio)
    box = tuple(GOLDEN['cutmix_box'].tolist())
    monkeypatch.setattr(ReversedCutMix, 'rand_bbox', lambda *args, **kwargs: box)
    images = torch.from_numpy(array('mixing/images', (4, 3, 32, 32)))
    before = images.clone()
    labels = torch.from_numpy(GOLDEN['labels'])
    scores = torch.nn.functional.one_hot(labels, 10)
    mixed, scores = augment(images, scores)
    assert torch.equal(images, before)  # the caller's are as they were
    assert np.array_equal(mixed.numpy(), GOLDEN[f'{name}_images'])
    smooth = LabelSmoothLoss(0.1, num_classes=10).smooth_label(scores)
    assert np.abs(smooth.numpy() - GOLDEN[f'{name}_targets']).max() < 1e-7


def test_ratios_follow_the_beta_distribution():
    """Beta(a, a) has the mean 1/2 and the variance 1 / (8 a + 4)."""
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # No box crosses the border of so large an image to matter: the area is the ratio.
    for augment, alpha in (
        (ReversedMixup(alpha=0.8), 0.8),
        (ReversedCutMix(alpha=1.0, correct_lam=False), 1.0),
    ):
        np.random.seed(0)
        images = torch.zeros(2, 1, 4, 4)
        ratios = np.array([augment(images, scores)[1][0, 0] for _ in range(4000)])
        assert abs(ratios.mean() - 0.5) < 0.02
        assert ratios.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.08)
