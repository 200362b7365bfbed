# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import os

import numpy as np
import pytest

from mlla_mm.checks.published import PUBLISHED, check_published

from .. import bad_data
from ..bad_data import HEIGHT, WIDTH, assert_says, noise, save

mmdet_datasets = pytest.importorskip('mmdet.datasets')
for package in ('mmseg', 'mmpretrain'):
    pytest.importorskip(package)

COUNTS = dict(train=3, val=2)


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Copies of a few images are complete."""
    if 'published' not in request.node.name:
        for name, published in PUBLISHED.items():
            counts = dict(train=1000, val=1000) if name == 'imagenet' else COUNTS
            small = published._replace(num_images=counts)
            monkeypatch.setitem(PUBLISHED, name, small)


@pytest.fixture
def ade20k(tmp_path):
    root = tmp_path / 'ADEChallengeData2016'
    labels = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 151
    for split, count in zip(('training', 'validation'), COUNTS.values()):
        for i in range(count):
            save(root / f'images/{split}/{i}.jpg', noise(HEIGHT, WIDTH, 3))
            save(root / f'annotations/{split}/{i}.png', labels.astype(np.uint8))
    return root


def annotations(root, split):
    return root / f'annotations/instances_{split}2017.json'


@pytest.fixture
def coco(tmp_path):
    names = mmdet_datasets.CocoDataset.METAINFO['classes']
    for split, count in COUNTS.items():
        content = bad_data.coco_content()
        content['categories'] = [dict(id=i, name=x) for i, x in enumerate(names)]
        content['images'] = content['images'][:count]
        # As many that a few odd ones are as rare as in COCO.
        content['annotations'] = [
            dict(
                content['annotations'][0], id=i, image_id=i % count, category_id=i % 80
            )
            for i in range(1, 2001)
        ]
        for i in range(count):
            save(tmp_path / f'{split}2017/{i}.jpg', noise(HEIGHT, WIDTH, 3))
        annotations(tmp_path, split).parent.mkdir(exist_ok=True)
        annotations(tmp_path, split).write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def imagenet(tmp_path):
    """One image in each of 1000 folders, twice."""
    file = tmp_path / 'image.JPEG'
    save(file, noise(9, 9, 3))
    for split in COUNTS:
        for i in range(1000):
            (tmp_path / split / f'n{i:03}').mkdir(parents=True)
            os.link(file, tmp_path / split / f'n{i:03}/0.JPEG')
    return tmp_path


@pytest.mark.parametrize('look', ['files', 'pixels'])
def test_nothing_is_wrong(ade20k, coco, imagenet, look):
    # All three lie in one folder. Files of another data set do not matter.
    for name, root in (('ade20k', ade20k), ('coco', coco), ('imagenet', imagenet)):
        assert check_published(name, root, look) == []


@pytest.mark.parametrize('name', PUBLISHED)
def test_empty_and_missing_folder(tmp_path, name):
    found = check_published(name, tmp_path)
    assert len(found) == 2 and all('not found' in x.problem for x in found)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        check_published(name, tmp_path / 'nowhere')


def test_published_counts_and_sources(ade20k, coco, imagenet):
    for name, root, counts, source in (
        ('ade20k', ade20k, (20210, 2000), 'ADEChallengeData2016.zip'),
        ('coco', coco, (118287, 5000), 'train2017.zip'),
        ('imagenet', imagenet, (1281167, 50000), 'https://image-net.org'),
    ):
        found = check_published(name, root, 'files')
        assert len(found) == 2
        for finding, count in zip(found, counts):
            assert_says(finding.problem, f'expected {count}', root)
            assert_says(finding.fix, source, root.parent)


FILES = {
    'ade20k': 'images/training/1.jpg',
    'coco': 'val2017/1.jpg',
    'imagenet': 'train/n001/0.JPEG',
}


@pytest.mark.parametrize('name', FILES)
def test_unreadable_images(request, name):
    root = request.getfixturevalue(name)
    path = root / FILES[name]
    content = path.read_bytes()
    path.unlink()  # not the other links of the file
    path.write_bytes(content[:-9])
    (found,) = check_published(name, root)
    assert_says(found.problem, f'{path.name} is truncated')
    assert check_published(name, root, 'files') == []
    bad_data.empty(path)
    (found,) = check_published(name, root, 'files')
    assert_says(found.problem, f'{path.name} is empty')


def test_label_maps_of_ade20k(ade20k):
    maps = ade20k / 'annotations/training'
    (maps / '1.png').rename(maps / 'lonely.png')
    labels = np.full((HEIGHT, WIDTH), 151, np.uint8)
    save(maps / '0.png', labels)
    bad_data.empty(ade20k / 'annotations/validation/1.png')
    found = [finding.problem for finding in check_published('ade20k', ade20k)]
    assert len(found) == 4
    assert_says(found, f'are not in {maps}: 1.png', 'have no image', 'lonely.png')
    assert_says(found, 'labels above 150 (151 in 2400 pixels): 0.png')
    assert_says(found, '1.png is empty')


def test_boxes_of_no_size_are_in_coco(coco):
    content = json.loads(annotations(coco, 'train').read_text())
    content['annotations'][0]['bbox'][2] = 0
    annotations(coco, 'train').write_text(json.dumps(content))
    assert check_published('coco', coco) == []
    content['annotations'][0]['category_id'] = 81
    annotations(coco, 'train').write_text(json.dumps(content))
    (found,) = check_published('coco', coco)
    assert_says(found.problem, 'unknown category_id')
    assert_says(found.fix, 'annotations_trainval2017.zip')


def test_folders_of_imagenet(imagenet):
    (imagenet / 'val/n003').rename(imagenet / 'val/m003')
    (found,) = check_published('imagenet', imagenet, 'files')
    assert_says(found.problem, '2 class folders are in only one', 'm003, n003')
    (imagenet / 'val').rename(imagenet / 'sorted')
    (imagenet / 'val').mkdir()
    (found,) = check_published('imagenet', imagenet, 'files')
    assert_says(found.problem, 'No class folders', imagenet / 'val')
    assert_says(found.fix, 'valprep.sh')
    # mmpretrain reads a list instead of class folders.
    (imagenet / 'meta').mkdir()
    os.link(imagenet / 'image.JPEG', imagenet / 'val/0.JPEG')
    (imagenet / 'meta/val.txt').write_text('0.JPEG 1\n' * 1000)
    assert check_published('imagenet', imagenet, 'files') == []
