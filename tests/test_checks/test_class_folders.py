# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Class folders and lists: the file, what is wrong, and the way out."""

import pytest

from mlla_mm.checks.data import check_data

from ..bad_data import (
    CLS,
    PREFIX,
    assert_refused,
    assert_says,
    config,
    empty,
    rename,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


def write_list(content):
    def apply(root):
        (root / 'meta').mkdir()
        raw = content if isinstance(content, bytes) else content.encode()
        (root / 'meta/train.txt').write_bytes(raw)

    return apply


LIST, LINES = 'meta/train.txt', 'IMAGE LABEL'
FOLDER_ERRORS = {
    'no folder': (rename('train', 'training'), 'train', 'not found', PREFIX),
    'no class folders': (
        lambda root: [x.rename(root / f'val/{x.name}x') for x in root.glob('train/*')],
        'train', 'FOLDER/CLASS/IMAGE'),
    'a class folder too many': (
        lambda root: (root / 'train/.cache').mkdir(),
        'train', '11', '10 classes', '.cache, 0, 1 and 8 more', 'num_classes'),
    'empty list': (write_list(''), LIST, 'empty', LINES),
    'not UTF-8': (write_list(b'0/\xff.png 0'), LIST, 'UTF-8', LINES),
    'no labels': (write_list('0/image.png 0\n1/image.png\n'),
                  LIST, 'label from 0 to 9', 'line 2.', LINES),
    'labels out of range': (write_list('0/image.png 0\n1/image.png 10\n'),
                            LIST, 'label from 0 to 9', 'line 2.', LINES),
    'absent image': (write_list('0/image.png 0\n1/picture.png 1\n'),
                     'train: 1/picture.png', PREFIX),
}  # fmt: skip


@pytest.mark.parametrize('case', FOLDER_ERRORS)
def test_class_folders(folders, case):
    spoil, *words = FOLDER_ERRORS[case]
    spoil(folders)
    assert_refused(CLS, folders, *words)


def test_images_of_class_folders(folders):
    (folders / 'train/3/image.png').unlink()
    empty(folders / 'train/4/image.png')
    (folders / 'train/5/\x1b[31m\n.png').write_bytes(b'')
    without, of_no_bytes = check_data(config(CLS, folders), 'train').findings
    assert_says(without.problem, 'without an image', f'{folders}/train: 3')
    assert_says(of_no_bytes.problem, f'{folders}/train', '4/image.png is empty')
    assert_says(of_no_bytes.problem, r'5/\x1b[31m\n.png is empty')
    assert of_no_bytes.problem.isprintable()
