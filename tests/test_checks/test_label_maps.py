# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images and label maps: the file, what is wrong, and the way out."""

import numpy as np
import pytest

from mlla_mm.checks.data import check_data

from .. import bad_data
from ..bad_data import (
    HEIGHT,
    PREFIX,
    SEG,
    WIDTH,
    assert_refused,
    assert_says,
    config,
    empty,
    rename,
    save,
    truncate,
    turn,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


def labels(*shape, value=1, dtype=np.uint8):
    return lambda root: save(root / 'maps/1.png', np.full(shape, value, dtype))


def map_file(spoil):
    return lambda root: spoil(root / 'maps/1.png')


SUFFIX = 'seg_map_suffix of train_dataloader'
MASK_ERRORS = {
    'no image folder': (rename('images', 'pictures'), 'images', 'not found', PREFIX),
    'no folder of label maps': (rename('maps', 'masks'),
                                'maps', 'not found', 'data_prefix', SUFFIX),
    'other suffix': (
        lambda root: [x.rename(x.with_suffix('.JPG')) for x in root.glob('images/*')],
        'images', '*.jpg', 'img_suffix of train_dataloader'),
    'no label map': (lambda root: (root / 'maps/2.png').unlink(),
                     'maps: 2.png', 'data_prefix', SUFFIX),
}  # fmt: skip


@pytest.mark.parametrize('case', MASK_ERRORS)
def test_folders_of_label_maps(masks, case):
    spoil, *words = MASK_ERRORS[case]
    spoil(masks)
    assert_refused(SEG, masks, *words)


OTHER_SIZE = 'another size than their label map'
MASK_FINDINGS = {
    'other size': (labels(HEIGHT, WIDTH - 1), OTHER_SIZE),
    'transposed': (labels(WIDTH, HEIGHT), OTHER_SIZE),
    # Only the image is turned.
    'turned': (lambda root: turn(6)(root / 'images/1.jpg'), OTHER_SIZE),
    'unknown labels': (labels(HEIGHT, WIDTH, value=12), 'labels above 11: 1.jpg'),
    'colours': (labels(HEIGHT, WIDTH, 3), 'not of one 8-bit channel'),
    '16 bit': (labels(HEIGHT, WIDTH, dtype=np.uint16), 'not of one 8-bit channel'),
    'empty': (labels(HEIGHT, WIDTH, value=0), 'no labelled pixel: 1.jpg'),
    'truncated': (
        map_file(truncate),
        'label map that cannot be read: ../maps/1.png is ',
    ),
    'zero bytes': (map_file(empty), 'label map that cannot be read: ../maps/1.png is '),
    'pipe': (
        map_file(bad_data.pipe),
        'label map that cannot be read: ../maps/1.png is ',
    ),
    'link to nothing': (
        map_file(bad_data.link_to_nothing),
        'label map that cannot be read: ../maps/1.png cannot',
    ),
    'PostScript': (
        map_file(bad_data.postscript),
        'label map that cannot be read: ../maps/1.png is ',
    ),
}


@pytest.mark.parametrize('case', MASK_FINDINGS)
@pytest.mark.usefixtures('no_waiting')
def test_label_maps(masks, case):
    spoil, problem = MASK_FINDINGS[case]
    spoil(masks)
    (finding,) = check_data(config(SEG, masks), 'train').findings
    assert_says(finding.problem, problem, f'1 images in {masks}/images')
    assert finding.fatal == (case != 'empty')


def test_labels_that_are_classes(masks):
    """11 classes: 0 to 10, or 1 to 11 if 0 is unlabelled; 255 always is."""
    cfg = config(SEG, masks)
    labels(HEIGHT, WIDTH, value=255)(masks)
    save(masks / 'maps/2.png', np.full((HEIGHT, WIDTH), 11, np.uint8))
    cfg.train_dataloader.dataset.reduce_zero_label = False
    above, unlabelled = check_data(cfg, 'train').findings
    assert_says(above.problem, 'labels above 10: 0.jpg, 2.jpg', f'{masks}/images')
    assert_says(unlabelled.problem, 'no labelled pixel: 1.jpg')
