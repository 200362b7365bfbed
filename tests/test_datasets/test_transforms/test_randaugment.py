# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""RandAugment, against the authors' (timm's), Pillow's and mmpretrain's."""

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image, ImageEnhance, ImageOps

pytest.importorskip('mmpretrain')

from mmpretrain.datasets import transforms
from mmpretrain.registry import TRANSFORMS

from mlla_mm.datasets.transforms import randaugment
from mlla_mm.datasets.transforms.randaugment import RandAugment

from .test_classification import DATA, picture

MODULE = 'mlla_mm.datasets.transforms.randaugment'
FILL = (104, 116, 124)
RECIPE = dict(
    policies='timm_increasing',
    num_policies=2,
    magnitude_level=9,
    magnitude_std=0.5,
    hparams=dict(pad_val=list(FILL), interpolation='bicubic'),
)
# Greatest mean of the absolute difference to timm's, and greatest difference, in the
# order of the policies. A turn or shift to the wrong side has a mean of 38 to 50.
TOLERANCES = dict(
    AutoContrast=(0, 0),
    Equalize=(0, 0),
    Invert=(0, 0),
    Rotate=(1.5, 70),
    PosterizeIncreasing=(0, 0),
    SolarizeIncreasing=(0, 0),
    SolarizeAdd=(0, 0),
    ColorIncreasing=(0.005, 1),
    ContrastIncreasing=(0, 0),
    BrightnessIncreasing=(0, 0),
    SharpnessIncreasing=(0.001, 1),
    ShearX=(2.2, 60),
    ShearY=(2.2, 82),
    TranslateXRel=(0.005, 1),
    TranslateYRel=(0.005, 1),
)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def fixed(operation, strength, sign=1):
    """An operation that is certain, and that draws these."""
    operation.random_disable = lambda: False
    operation.random_magnitude = lambda: strength
    operation.random_negative = lambda value: sign * value
    return operation


def apply(operation, image):
    return operation(dict(img=image))['img']


@pytest.mark.parametrize('name', TOLERANCES)
def test_operations_are_those_of_the_authors(name):
    golden = np.load(DATA / 'randaugment.npz')
    image = golden['image'][..., ::-1]
    operation = RandAugment(**RECIPE).transforms[list(TOLERANCES).index(name)]
    low, high = operation.magnitude_range or (0, 0)
    keys = [key for key in golden.files if key.startswith(f'{name}/')]
    assert len(keys) in (3, 6)
    for key in keys:
        _, level, sign = key.split('/')
        # OpenCV's matrices map the other way.
        turn = -1 if name.startswith(('Rotate', 'Shear', 'Translate')) else 1
        sign = -turn if sign == '-' else turn
        fixed(operation, int(level) / 10 * (high - low) + low, sign)
        actual = apply(operation, image.copy())[..., ::-1]
        assert actual.dtype == np.uint8
        difference = np.abs(actual.astype(int) - golden[key])
        mean, greatest = TOLERANCES[name]
        assert difference.mean() <= mean, key
        assert difference.max() <= greatest, key


PICTURES = {
    'picture': picture(60, 50, 3),
    'noise': np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8),
    'of one colour': np.full((60, 50, 3), (0, 77, 255), np.uint8),
    'of two values': picture(60, 50, 3) // 128 * 90 + 7,
    'of few pixels': picture(3, 4, 3),
}
TABLES = {
    'AutoContrast': ImageOps.autocontrast,
    'Equalize': ImageOps.equalize,
    'Solarize': lambda image, value: ImageOps.solarize(image, value),
}
ENHANCE = dict(
    ColorTransform=ImageEnhance.Color,
    Contrast=ImageEnhance.Contrast,
    Brightness=ImageEnhance.Brightness,
    Sharpness=ImageEnhance.Sharpness,
)


def build(name, **options):
    return TRANSFORMS.build(dict(type=f'{MODULE}.{name}', prob=1.0, **options))


@pytest.mark.parametrize('name', PICTURES)
def test_tables_are_those_of_pillow(name):
    image = PICTURES[name]
    pillow = Image.fromarray(image)
    for kind in ('AutoContrast', 'Equalize'):
        expected = np.asarray(TABLES[kind](pillow))
        assert np.array_equal(apply(build(kind), image), expected), kind
    for thr in (0, 1, 100, 256):
        expected = np.asarray(ImageOps.solarize(pillow, thr))
        assert np.array_equal(apply(build('Solarize', thr=thr), image), expected)


@pytest.mark.parametrize('kind', ENHANCE)
@pytest.mark.parametrize('name', PICTURES)
def test_blends_are_those_of_pillow(kind, name):
    image = PICTURES[name]
    pillow = Image.fromarray(image[..., ::-1])
    for magnitude in (-1, -0.83, -0.25, 0, 0.4, 0.9):
        operation = build(kind, magnitude=magnitude, random_negative_prob=0.0)
        expected = np.asarray(ENHANCE[kind](pillow).enhance(1 + magnitude))
        difference = np.abs(apply(operation, image)[..., ::-1].astype(int) - expected)
        # OpenCV's grey may be one off, of which Color blends what is not the image's.
        assert difference.max() <= (2 if kind == 'ColorTransform' else 1)
        assert difference.mean() <= 0.02


@pytest.mark.parametrize('direction', ['horizontal', 'vertical'])
@pytest.mark.parametrize('name', ['noise', 'of few pixels'])
def test_translation_is_that_of_pillow(direction, name):
    image = PICTURES[name]
    height, width, _ = image.shape
    size = width if direction == 'horizontal' else height
    shifts = (0, 0.2, 0.5, 0.7, 2, 1.3, size - 0.6, size - 0.5, size - 0.3, size + 2)
    for shift in [*shifts, *(-shift for shift in shifts)]:
        operation = build(
            'Translate',
            magnitude=shift / size,
            direction=direction,
            pad_val=FILL,
            interpolation='bicubic',
            random_negative_prob=0.0,
        )
        matrix = [1, 0, 0, 0, 1, 0]
        matrix[2 if direction == 'horizontal' else 5] = -(shift / size) * size
        expected = Image.fromarray(image).transform(
            (width, height), Image.AFFINE, matrix, Image.BICUBIC, fillcolor=FILL
        )
        difference = np.abs(apply(operation, image).astype(int) - np.asarray(expected))
        assert difference.max() <= 1
        assert difference.mean() <= (0 if shift == int(shift) else 0.01)


def test_draws_are_those_of_mmpretrain():
    fast, slow = RandAugment(**RECIPE), transforms.RandAugment(**RECIPE)
    assert fast.policies == slow.policies
    replaced = [type(step).__module__ == MODULE for step in fast.transforms]
    assert sum(replaced) == len(replaced) - 5
    image = picture(64, 64, 3)
    changed = 0
    for seed in range(300):
        np.random.seed(seed)
        actual = apply(fast, image)
        after = np.random.rand()
        np.random.seed(seed)
        expected = apply(slow, image)
        assert np.random.rand() == after
        # The second operation may make more of a difference of 1, as Posterize does.
        assert np.abs(actual.astype(int) - expected).mean() < 5
        changed += not np.array_equal(expected, image)
    assert changed > 150


def test_other_policies_keep_their_operations():
    policies = [
        dict(type='Equalize', prob=1.0),
        dict(type='Cutout', magnitude_range=(0, 16)),
        dict(type=f'{MODULE}.Translate', magnitude_range=(0, 1)),
    ]
    hparams = dict(pad_val=list(FILL), interpolation='bicubic')
    steps = RandAugment(policies, 1, 5, hparams=hparams).transforms
    equalize, cutout, translate = steps
    assert type(equalize) is randaugment.Equalize
    assert type(cutout) is transforms.Cutout
    assert type(translate) is randaugment.Translate
    assert equalize.prob == 1
    assert cutout.pad_val == translate.pad_val == FILL
    assert translate.interpolation == 'bicubic'


@pytest.mark.parametrize(
    'name, options',
    [
        ('Solarize', dict(thr=100)),
        ('SolarizeAdd', dict(magnitude=50)),
        ('Brightness', dict(magnitude=0.5)),
        ('Contrast', dict(magnitude=0.5)),
        ('ColorTransform', dict(magnitude=0.5)),
        ('Sharpness', dict(magnitude=0.5)),
        ('Translate', dict(magnitude=0.21, interpolation='bicubic')),
        ('Translate', dict(magnitude=0.21, interpolation='nearest')),
    ],
)
def test_other_images_are_left_to_mmpretrain(name, options):
    images = [picture(40, 30, 3).astype(np.float32)]
    if options.get('interpolation') == 'nearest':
        images.append(picture(40, 30, 3))
    for image in images:
        results = []
        for kind in (f'{MODULE}.{name}', name):
            np.random.seed(1)
            step = TRANSFORMS.build(dict(type=kind, prob=1.0, **options))
            results.append(apply(step, image))
        assert results[0].dtype == image.dtype
        assert np.array_equal(*results)
