# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Data that do not fit a config, of any format."""

import pytest
from PIL import Image

from mlla_mm.checks.data import check_data, check_splits, require_data

from .. import bad_data
from ..bad_data import (
    CLS,
    DET,
    SEG,
    assert_says,
    config,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
@pytest.mark.parametrize(
    'spoil', ['postscript', 'pipe', 'endless', 'link_to_nothing', 'bomb']
)
@pytest.mark.usefixtures('no_waiting')
def test_files_of_strangers(tmp_path, monkeypatch, scope, spoil, tmp_path_factory):
    marker = bad_data.fake_ghostscript(monkeypatch, tmp_path_factory.mktemp('bin'))
    make, name = {
        DET: (bad_data.make_coco, 'images/1.jpg'),
        SEG: (bad_data.make_masks, 'images/1.jpg'),
        CLS: (bad_data.make_folders, 'train/4/image.png'),
    }[scope]
    make(tmp_path)
    getattr(bad_data, spoil)(tmp_path / name)
    found = check_data(config(scope, tmp_path), 'train').findings
    assert not marker.exists()
    (finding,) = found
    if scope == SEG and spoil in ('pipe', 'endless', 'link_to_nothing'):
        # mmseg takes no image that is no file.
        assert_says(finding.problem, 'label maps', 'have no image', ': 1.png')
        return
    problem = 'pixels are the limit' if spoil == 'bomb' else ''
    assert_says(finding.problem, 'cannot be read', name.partition('/')[2], problem)


def test_good_data(coco, masks, folders):
    for scope, root in ((DET, coco), (SEG, masks), (CLS, folders)):
        cfg = config(scope, root)
        assert (
            check_data(cfg, 'train').findings == check_data(cfg, 'val').findings == []
        )
        assert check_data(cfg, 'test') is not None  # it names data that are missing


def test_data_sets_without_a_check(folders):
    cfg = config(CLS, folders)
    names = cfg.val_dataloader.dataset.metainfo
    other = dict(type='CIFAR10', data_root='nowhere', metainfo=names)
    cfg.train_dataloader.dataset = other
    assert check_data(cfg, 'train') is None
    require_data(cfg, 'train')
    assert check_splits(cfg).findings == []
    cfg.val_dataloader.dataset.type = 'ImageNett'
    with pytest.raises(KeyError, match='ImageNett is not in the'):
        check_splits(cfg)
    cfg.val_dataloader.dataset = cfg.train_dataloader.dataset
    with pytest.raises(ValueError, match='There is no check for the data sets of'):
        check_splits(cfg)


def test_class_folders_without_labels(folders):
    """Their folders are no classes, so they need not be those of the validation."""
    cfg = config(CLS, folders)
    cfg.train_dataloader.dataset = dict(
        type='CustomDataset', data_root=str(folders), data_prefix='train'
    )
    (folders / 'train/3').rename(folders / 'train/x')
    (finding,) = check_splits(cfg).findings
    assert_says(finding.problem, 'in only one of train and val: 3, x')
    with pytest.raises(ValueError, match='in only one of train and val: 3, x'):
        require_data(cfg, 'train', 'val')
    cfg.train_dataloader.dataset.with_label = False
    assert check_splits(cfg).findings == []


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_images_are_read_as_in_training(folders, backend):
    """Pillow reads TIFF files of 32 bits, and OpenCV does not."""
    path = folders / 'train/3/image.png'
    Image.new('I', (8, 8)).save(path, format='TIFF')
    cfg = config(CLS, folders)
    cfg.train_dataloader.dataset.pipeline[0].imdecode_backend = backend
    found = [finding.problem for finding in check_data(cfg, 'train').findings]
    assert len(found) == (backend == 'cv2')
    assert_says(found, *['3/image.png cannot be decoded by OpenCV'] * len(found))


def test_missing_data():
    with pytest.raises(ValueError, match='nowhere'):
        require_data(config(CLS, 'nowhere'), 'train')
