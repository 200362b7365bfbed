# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images of the training that are also in another split."""

import os

import pytest

from mlla_mm.checks.data import check_data, require_data
from mlla_mm.checks.shared_images import check_shared_images
from mlla_mm.checks.source import FILES, NAMES, PIXELS, Source

from ..bad_data import CLS, DET, assert_says, config, noise, pipe, save

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

SAME_ENDS = b'x' * 9999


def write(root, content):
    """Files in folders that are named as splits, with which a path begins."""
    splits = {}
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        splits.setdefault(name.partition('/')[0], []).append(path)
    return splits


def find(splits, look=FILES, **kwargs):
    sources = [
        Source(split, '', None, {}, None, look, images=images, **kwargs)
        for split, images in splits.items()
    ]
    return list(check_shared_images(sources))


CONTENT = {
    'none': ({'train/a': b'1', 'val/a': b'2', 'val/b': b'12'}, []),
    'copy of another name': ({'train/a': b'1', 'train/b': b'2', 'val/c': b'2'},
                             ['val/c = train/b']),
    'copies': ({'train/a': b'1', 'train/b': b'2', 'val/c': b'2', 'val/a': b'1'},
               ['val/c = train/b', 'val/a = train/a']),
    'copies within a split': ({'train/a': b'1', 'train/b': b'1', 'val/a': b'2',
                               'val/b': b'2'}, []),
    'copies within both': ({'train/a': b'1', 'train/b': b'1', 'val/a': b'1',
                            'val/b': b'1'}, ['val/a = train/a', 'val/b = train/a']),
    'empty files': ({'train/a': b'', 'val/a': b''}, []),
    'another start': ({'train/a': b'1' + SAME_ENDS, 'val/a': b'2' + SAME_ENDS}, []),
    'the same start': ({'train/a': SAME_ENDS + b'1', 'val/a': SAME_ENDS + b'2'}, []),
    'long copies': ({'train/a': b'1' + SAME_ENDS, 'val/a': b'1' + SAME_ENDS},
                    ['val/a = train/a']),
    'validation and testing': ({'val/a': b'1', 'test/a': b'1'}, []),
}  # fmt: skip


@pytest.mark.parametrize('case', CONTENT)
def test_content(tmp_path, case):
    content, pairs = CONTENT[case]
    splits = write(tmp_path, content)
    assert find(splits, NAMES) == []
    found = find(splits)
    assert len(found) == bool(pairs)
    for finding in found:
        shown = [
            ' = '.join(str(tmp_path / x) for x in pair.split(' = ')) for pair in pairs
        ]
        assert not finding.fatal
        assert_says(finding.problem, f'{len(pairs)} images of val are also in train')
        assert finding.problem.endswith(': ' + ', '.join(shown))


def test_each_other_split(tmp_path):
    splits = write(tmp_path, dict.fromkeys(['train/a', 'val/a', 'test/a'], b'1'))
    val, test = find(splits)
    assert_says(val.problem, 'images of val', 'val/a = ')
    assert_says(test.problem, 'images of test', 'test/a = ')


@pytest.mark.usefixtures('no_waiting')
def test_files_that_cannot_be_read(tmp_path):
    splits = write(tmp_path, dict.fromkeys(['train/a', 'train/b', 'val/a'], b'1'))
    pipe(splits['train'][0])
    splits['train'].append(tmp_path / 'absent')
    splits['train'].append(tmp_path / 'no\0name')
    (finding,) = find(splits)
    assert_says(finding.problem, 'train/b')


@pytest.mark.parametrize('look', [NAMES, FILES])
def test_one_path(tmp_path, look):
    """Also through a link to a folder. The files are not read."""
    images = write(tmp_path, {'train/a': b'1', 'train/b': b'2', 'other/c': b'3'})
    (tmp_path / 'val').symlink_to('train')
    splits = dict(train=images['train'], val=[tmp_path / 'val/b', *images['other']])
    (finding,) = find(splits, look)
    assert_says(finding.problem, f'1 images of val are also in train: {tmp_path}/val/b')
    assert finding.problem.endswith(f' = {tmp_path}/train/b')
    assert_says(finding.fix, 'data_prefix', 'val_dataloader')


def test_validation_on_the_training(coco):
    (finding,) = require_data(config(DET, coco), 'train', 'val').findings
    assert_says(finding.problem, '3 images of val', f': {coco}/images/0.jpg, ')
    assert check_data(config(DET, coco), 'train', look=PIXELS).findings == []


def test_parts_of_one_data_set(folders):
    cfg = config(CLS, folders)
    one = cfg.train_dataloader.dataset
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset = dict(type='RepeatDataset', times=1, dataset=one)
    assert len(require_data(cfg, 'train', 'val').findings) == 1
    for fold, loader in enumerate((cfg.train_dataloader, cfg.val_dataloader)):
        loader.dataset.dataset = dict(
            type='KFoldDataset', dataset=one, test_mode=bool(fold)
        )
    assert require_data(cfg, 'train', 'val').findings == []
    cfg.train_dataloader.dataset = dict(one, indices=[*range(10)])
    cfg.val_dataloader.dataset = dict(one, indices=[*range(9, -1, -1)])
    assert require_data(cfg, 'train', 'val').findings == []


@pytest.mark.parametrize('look', [NAMES, FILES, PIXELS])
def test_copied_images_of_class_folders(folders, look):
    os.link(folders / 'train/3/image.png', folders / 'val/4/copy.png')
    save(folders / 'val/5/new.png', noise(9, 9, 3))
    found = check_data(config(CLS, folders), 'train', 'val', look=look).findings
    assert len(found) == (look != NAMES)
    for finding in found:
        assert_says(finding.problem, '1 images of val', 'val/4/copy.png = ')
