# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from mlla_mm.datasets import digits

SMALL = dict(seed=0, train=30, val=10, size=64)


@pytest.fixture(scope='module')
def coco_root(tmp_path_factory):
    return digits.make_coco(tmp_path_factory.mktemp('coco') / 'data', **SMALL)


@pytest.fixture(scope='module')
def ade20k_root(tmp_path_factory):
    return digits.make_ade20k(tmp_path_factory.mktemp('ade20k') / 'data', **SMALL)


@pytest.fixture(scope='module')
def imagenet_root(tmp_path_factory):
    return digits.make_imagenet(tmp_path_factory.mktemp('imagenet') / 'data', **SMALL)


def read_files(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in Path(root).rglob('*')
        if path.is_file()
    }


def load_coco(root, split):
    return COCO(str(root / 'annotations' / f'instances_{split}.json'))


@pytest.mark.parametrize('seed', [0, 7])
def test_split_digits_parts_every_class(seed):
    labels = load_digits().target
    split = digits.split_digits(labels, seed)
    together = np.concatenate([split['train'], split['val']])
    assert np.array_equal(np.sort(together), np.arange(len(labels)))
    shares = np.bincount(labels[split['val']]) / np.bincount(labels)
    assert np.allclose(shares, 0.2, atol=0.01)


def test_split_digits_depends_on_seed_alone():
    labels = load_digits().target
    first, again, other = (digits.split_digits(labels, seed) for seed in (0, 0, 1))
    assert np.array_equal(first['val'], again['val'])
    assert not np.array_equal(first['val'], other['val'])


def test_coco_splits_share_no_digit_and_name_the_right_one(coco_root):
    labels = load_digits().target
    used = {}
    for split in ('train', 'val'):
        annotations = load_coco(coco_root, split).dataset['annotations']
        used[split] = {ann['source_index'] for ann in annotations}
        for ann in annotations:
            assert ann['category_id'] == labels[ann['source_index']] + 1
    assert len(used['train']) > 30 and len(used['val']) >= 10
    assert not used['train'] & used['val']


def test_imagenet_splits_share_no_digit_and_name_the_right_one(imagenet_root):
    labels = load_digits().target
    used = {}
    for split in ('train', 'val'):
        paths = list((imagenet_root / split).rglob('*.png'))
        assert len(paths) == SMALL[split]
        sources = {int(path.stem.split('_')[1]): path.parent.name for path in paths}
        assert all(str(labels[index]) == name for index, name in sources.items())
        # Each digit comes once before any comes twice.
        assert len(sources) == len(paths)
        used[split] = set(sources)
    assert not used['train'] & used['val']


def test_backgrounds_of_the_splits_do_not_overlap():
    height, width = digits.load_source().photos[0].shape[:2]
    columns = np.broadcast_to(np.arange(width) * 255 / width, (height, width))
    photo = np.repeat(np.uint8(columns)[..., None], 3, axis=2)
    boundary = digits.PHOTO_SPLIT_COLUMN * 255 / width
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert digits.crop_photo(rng, photo, 'train', 40).max() <= boundary
        assert digits.crop_photo(rng, photo, 'val', 40).min() >= int(boundary)


@pytest.mark.parametrize(
    'make', [digits.make_coco, digits.make_ade20k, digits.make_imagenet]
)
def test_same_arguments_give_the_same_bytes(make, tmp_path):
    arguments = dict(seed=3, train=6, val=3, size=64)
    first = read_files(make(tmp_path / 'first', **arguments))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        second = read_files(make(tmp_path / 'second', **arguments))
    finally:
        cv2.setNumThreads(threads)
    other = read_files(make(tmp_path / 'other', **{**arguments, 'seed': 4}))
    assert first == second
    assert not {v for k, v in first.items() if k.endswith('.png')} & set(other.values())


def test_a_small_set_is_the_beginning_of_a_larger_one(coco_root, tmp_path):
    small = digits.make_coco(tmp_path / 'data', **{**SMALL, 'train': 4, 'val': 2})
    large = read_files(coco_root)
    images = {k: v for k, v in read_files(small).items() if k.endswith('.png')}
    assert len(images) == 6
    assert all(large[name] == content for name, content in images.items())


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_masks_boxes_and_areas_agree(coco_root, split):
    coco = load_coco(coco_root, split)
    names = {cat['id']: cat['name'] for cat in coco.dataset['categories']}
    assert names == {digit + 1: str(digit) for digit in range(10)}
    assert len(coco.imgs) == SMALL[split]
    for image in coco.imgs.values():
        pixels = cv2.imread(str(coco_root / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3) == (64, 64, 3)
        annotations = coco.imgToAnns[image['id']]
        assert 1 <= len(annotations) <= 5
        masks = [coco.annToMask(ann) for ann in annotations]
        assert np.sum(masks, axis=0).max() == 1
        for ann, mask in zip(annotations, masks):
            assert isinstance(ann['segmentation']['counts'], str)
            assert ann['iscrowd'] == 0
            assert ann['area'] == mask.sum() > 0
            assert ann['bbox'] == list(cv2.boundingRect(mask))
            assert ann['bbox'] == coco_mask.toBbox(ann['segmentation']).tolist()


def test_digits_are_brighter_than_the_photograph(coco_root):
    coco = load_coco(coco_root, 'train')
    for image in coco.imgs.values():
        pixels = cv2.imread(str(coco_root / 'train' / image['file_name'])).max(axis=2)
        masks = [coco.annToMask(ann) for ann in coco.imgToAnns[image['id']]]
        background = pixels[np.sum(masks, axis=0) == 0]
        for mask in masks:
            assert np.median(pixels[mask == 1]) > np.median(background) + 50


def test_later_digits_hide_little_of_earlier_ones():
    source = digits.load_source()
    for index in range(50):
        # The same stream: both scenes put the same digit first at the same place.
        alone, crowded = (
            digits.compose_scene(
                source,
                list(range(count)),
                np.random.default_rng(index),
                'train',
                64,
                digits.SCENE_SCALE,
            )
            for count in (1, 5)
        )
        full, visible = ((scene.owner == 1) for scene in (alone, crowded))
        assert not (visible & ~full).any()
        assert visible.sum() >= digits.MIN_VISIBLE * full.sum()


@pytest.mark.parametrize('side', [8, 58, 200])
def test_no_glyph_vanishes_or_outgrows_its_grid(side):
    for glyph in digits.load_source().glyphs:
        opacity = digits.enlarge_glyph(glyph, side)
        mask = opacity > 0.5
        assert mask.any(axis=0)[[0, -1]].all() and mask.any(axis=1)[[0, -1]].all()
        assert mask.sum() > 0.1 * side**2
        assert max(mask.shape) <= 1.05 * side


def test_ade20k_labels_agree_with_coco(coco_root, ade20k_root):
    for split, folder in (('train', 'training'), ('val', 'validation')):
        coco = load_coco(coco_root, split)
        for image in coco.imgs.values():
            name = image['file_name']
            expected = np.ones((64, 64), np.uint8)
            for ann in coco.imgToAnns[image['id']]:
                digit = int(coco.cats[ann['category_id']]['name'])
                expected[coco.annToMask(ann) == 1] = digit + 2
            path = ade20k_root / 'annotations' / folder / name
            written = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert written.dtype == np.uint8 and written.shape == (64, 64)
            assert np.array_equal(written, expected)
            image_bytes = (ade20k_root / 'images' / folder / name).read_bytes()
            assert image_bytes == (coco_root / split / name).read_bytes()


def test_mmdet_reads_coco(coco_root):
    pytest.importorskip('mmdet')
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    dataset = CocoDataset(
        data_root=str(coco_root),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=digits.CLASSES, palette=digits.PALETTE),
    )
    coco = load_coco(coco_root, 'train')
    load = LoadAnnotations(with_bbox=True, with_mask=True)
    assert len(dataset) == SMALL['train']
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        annotations = coco.imgToAnns[info['img_id']]
        results = load.transform(LoadImageFromFile().transform(info))
        assert results['img'].shape == (64, 64, 3)
        assert results['gt_bboxes_labels'].tolist() == [
            ann['category_id'] - 1 for ann in annotations
        ]
        masks = np.stack([coco.annToMask(ann) for ann in annotations])
        assert np.array_equal(results['gt_masks'].masks, masks)


def test_mmseg_reads_ade20k(ade20k_root):
    pytest.importorskip('mmseg')
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    dataset = BaseSegDataset(
        data_root=str(ade20k_root),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        img_suffix='.png',
        reduce_zero_label=True,
        metainfo=dict(classes=digits.SEG_CLASSES, palette=digits.SEG_PALETTE),
    )
    assert len(dataset) == SMALL['train']
    assert len(digits.SEG_CLASSES) == len(digits.SEG_PALETTE) == 11
    seen = set()
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        seg_map = LoadAnnotations().transform(info)['gt_seg_map']
        assert Path(info['img_path']).is_file()
        assert np.bincount(seg_map.ravel()).argmax() == digits.SEG_CLASSES.index(
            'background'
        )
        seen |= set(np.unique(seg_map).tolist())
    assert seen == set(range(11))


@pytest.mark.parametrize('with_list', [True, False])
def test_mmpretrain_reads_imagenet(imagenet_root, with_list):
    pytest.importorskip('mmpretrain')
    from mmpretrain.datasets import CustomDataset, ImageNet

    for split in ('train', 'val'):
        if with_list:
            dataset = ImageNet(
                data_root=str(imagenet_root),
                split=split,
                metainfo=dict(classes=digits.CLASSES),
            )
        else:
            dataset = CustomDataset(data_root=str(imagenet_root), data_prefix=split)
        assert len(dataset) == SMALL[split]
        assert dataset.metainfo['classes'] == digits.CLASSES
        for index in range(len(dataset)):
            info = dataset.get_data_info(index)
            path = Path(info['img_path'])
            assert cv2.imread(str(path)).shape == (64, 64, 3)
            assert path.parent.name == digits.CLASSES[info['gt_label']]


def test_second_call_keeps_what_is_there(tmp_path):
    arguments = dict(train=2, val=1, size=32)
    out = digits.make_coco(tmp_path / 'data', **arguments)
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    assert digits.make_coco(tmp_path / 'data', **arguments) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == before


def test_other_contents_are_never_overwritten(tmp_path):
    out = digits.make_coco(tmp_path / 'data', train=2, val=1, size=32)
    before = read_files(out)
    with pytest.raises(FileExistsError, match='Remove it or choose another folder'):
        digits.make_coco(out, train=3, val=1, size=32)
    with pytest.raises(FileExistsError, match='Remove it or choose another folder'):
        digits.make_ade20k(out, train=2, val=1, size=32)
    assert read_files(out) == before

    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'notes.txt').write_text('keep')
    with pytest.raises(FileExistsError, match='other than a digits data set'):
        digits.make_coco(tmp_path / 'mine')
    with pytest.raises(FileExistsError, match='other than a digits data set'):
        digits.make_coco(tmp_path / 'mine' / 'notes.txt')
    assert read_files(tmp_path / 'mine') == {'notes.txt': b'keep'}


def test_empty_and_linked_folders_are_filled(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'disk')
    digits.make_coco(tmp_path / 'link', train=2, val=1, size=32)
    assert (tmp_path / 'link').is_symlink()
    assert len(list((tmp_path / 'disk' / 'train').iterdir())) == 2


@pytest.mark.parametrize('same', [True, False])
def test_first_of_several_processes_wins(tmp_path, monkeypatch, same):
    out = tmp_path / 'data'
    load_source = digits.load_source

    def load_while_another_process_finishes():
        monkeypatch.setattr(digits, 'load_source', load_source)
        digits.make_coco(out, seed=0 if same else 1, train=2, val=1, size=32)
        winner.update(read_files(out))
        return load_source()

    winner = {}
    monkeypatch.setattr(digits, 'load_source', load_while_another_process_finishes)
    if same:
        digits.make_coco(out, seed=0, train=2, val=1, size=32)
    else:
        with pytest.raises(FileExistsError, match='choose another folder'):
            digits.make_coco(out, seed=0, train=2, val=1, size=32)
    assert winner and read_files(out) == winner
    assert list(tmp_path.iterdir()) == [out]


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        # By now there are images: the interruption comes when they are described.
        assert list(tmp_path.rglob('*.png'))
        raise KeyboardInterrupt

    monkeypatch.setattr(json, 'dumps', interrupt)
    with pytest.raises(KeyboardInterrupt):
        digits.make_coco(tmp_path / 'data', train=2, val=1, size=32)
    assert not list(tmp_path.iterdir())


def test_readme_gives_origin_seed_and_counts(coco_root):
    text = (coco_root / 'README.md').read_text(encoding='utf-8')
    num_digits = len(load_coco(coco_root, 'train').anns)
    assert f'| train | 30 | {num_digits} | 1438 |' in text
    for part in ('seed 0', 'CC BY 4.0', 'UCI', 'danielbuechele', 'china.jpg'):
        assert part in text


@pytest.mark.parametrize(
    'name, value',
    [('size', 31), ('train', 0), ('val', 0), ('seed', -1), ('train', 1.5)],
)
def test_bad_arguments(tmp_path, name, value):
    with pytest.raises(ValueError, match=f'{name} must be .* but got {value}'):
        digits.make_coco(tmp_path / 'data', **{name: value})
    assert not list(tmp_path.iterdir())


def test_missing_scikit_learn_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match='pip install scikit-learn'):
        digits.make_coco(tmp_path / 'data')
    assert not list(tmp_path.iterdir())
