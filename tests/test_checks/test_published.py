# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

import mmcv
import numpy as np
import pytest
from PIL import ExifTags, Image

from mlla_mm.checks.published import (
    check_ade20k,
    check_coco,
    check_imagenet,
    image_size,
)

from .. import bad_data

COUNTS = (3, 2)
SIZE = (12, 8)


def save_image(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Noise: a file long enough to be cut in its image data.
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def save_mask(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, np.uint8)).save(path)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def problems(findings):
    return [finding.problem for finding in findings]


@pytest.fixture
def ade20k(tmp_path):
    root = tmp_path / 'ADEChallengeData2016'
    for split, count in zip(('training', 'validation'), COUNTS):
        for i in range(count):
            save_image(root / 'images' / split / f'{i}.jpg')
            labels = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]) + 55
            save_mask(root / 'annotations' / split / f'{i}.png', labels)
    return root


@pytest.fixture
def coco(tmp_path):
    for split, count in zip(('train2017', 'val2017'), COUNTS):
        for i in range(count):
            save_image(tmp_path / split / f'{i}.jpg')
        size = dict(width=SIZE[0], height=SIZE[1])
        write_annotations(
            tmp_path,
            split,
            images=[dict(id=i, file_name=f'{i}.jpg', **size) for i in range(count)],
            annotations=[dict(id=i, image_id=i, category_id=1) for i in range(count)],
            categories=[dict(id=i, name=str(i)) for i in range(1, 81)],
        )
    return tmp_path


def write_annotations(root, split, **content):
    path = root / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def read_annotations(root, split):
    path = root / 'annotations' / f'instances_{split}.json'
    return json.loads(path.read_text())


@pytest.fixture
def imagenet(tmp_path):
    for split, count in zip(('train', 'val'), COUNTS):
        for i in range(count):
            save_image(tmp_path / split / f'n{i % 2}' / f'{i}.JPEG')
    return tmp_path


def check_small_imagenet(root, fast=False):
    return check_imagenet(root, fast, COUNTS, num_classes=2)


@pytest.mark.parametrize('fast', [False, True])
def test_nothing_is_wrong(ade20k, coco, imagenet, fast):
    # All three in one folder: none minds what belongs to another data set.
    assert check_ade20k(ade20k, fast, COUNTS) == []
    assert check_coco(coco, fast, COUNTS) == []
    assert check_small_imagenet(imagenet, fast) == []


@pytest.mark.parametrize('check', [check_ade20k, check_coco, check_imagenet])
def test_empty_and_missing_folder(tmp_path, check):
    found = check(tmp_path)
    assert sum(problem.startswith('Folder missing') for problem in problems(found)) >= 2
    assert all(finding.fix for finding in found)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        check(tmp_path / 'nowhere')


def test_published_counts(ade20k, coco, imagenet):
    text = '\n'.join(
        problem
        for findings in (
            check_ade20k(ade20k, fast=True),
            check_coco(coco, fast=True),
            check_imagenet(imagenet, fast=True),
        )
        for problem in problems(findings)
    )
    for count in (20210, 2000, 118287, 5000, 1281167, 50000, 1000):
        assert f'expected {count}' in text


def test_files_too_many(ade20k):
    save_image(ade20k / 'images/validation/extra.jpg')
    found = check_ade20k(ade20k, counts=COUNTS)
    assert '3 files' in found[0].problem and 'expected 2' in found[0].problem
    assert found[0].fix.startswith('Remove')


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize(
    'name', ['images/training/1.jpg', 'annotations/validation/1.png']
)
def test_zero_bytes(ade20k, name, fast):
    (ade20k / name).write_bytes(b'')
    (found,) = problems(check_ade20k(ade20k, fast, COUNTS))
    assert 'zero bytes' in found and found.endswith(name.rpartition('/')[2])


@pytest.fixture(
    params=[
        ('ade20k', 'images/training/1.jpg'),
        ('ade20k', 'annotations/training/1.png'),
        ('coco', 'val2017/1.jpg'),
        ('imagenet', 'train/n1/1.JPEG'),
    ],
    ids='-'.join,
)
def file_and_check(request, ade20k, coco, imagenet):
    """A file of a data set, and what checks it, with or without decoding."""
    kind, name = request.param
    root, check = {
        'ade20k': (ade20k, lambda fast: check_ade20k(ade20k, fast, COUNTS)),
        'coco': (coco, lambda fast: check_coco(coco, fast, COUNTS)),
        'imagenet': (imagenet, lambda fast: check_small_imagenet(imagenet, fast)),
    }[kind]
    return root / name, check


def test_truncated_files(file_and_check):
    path, check = file_and_check
    truncate(path)
    (found,) = problems(check(fast=False))
    assert 'unreadable' in found and '1 images' in found
    # Without decoding it is not seen.
    assert check(fast=True) == []


@pytest.mark.parametrize(
    'spoil', ['postscript', 'pipe', 'endless', 'link_to_nothing', 'bomb']
)
@pytest.mark.usefixtures('no_waiting')
def test_files_of_strangers(file_and_check, spoil, monkeypatch, tmp_path_factory):
    path, check = file_and_check
    marker = bad_data.fake_ghostscript(monkeypatch, tmp_path_factory.mktemp('bin'))
    getattr(bad_data, spoil)(path)
    (found,) = problems(check(fast=False))
    is_map = 'annotations' in path.parts
    limit = 'more pixels than OPENCV_IO_MAX_IMAGE_PIXELS'
    assert (limit if spoil == 'bomb' and not is_map else 'unreadable') in found
    assert check(fast=True) == []
    assert not marker.exists()


@pytest.mark.usefixtures('no_waiting')
def test_annotations_in_a_pipe(coco):
    bad_data.pipe(coco / 'annotations/instances_val2017.json')
    (found,) = problems(check_coco(coco, counts=COUNTS))
    assert 'instances_val2017.json' in found


def test_names_are_printable(imagenet):
    (imagenet / 'train/n0/\x1b[31m\n.JPEG').write_bytes(b'')
    found = problems(check_small_imagenet(imagenet))
    assert any(r'\x1b[31m\n.JPEG' in problem for problem in found)
    assert all(problem.isprintable() for problem in found)


def orientation(value):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif.tobytes()


@pytest.mark.parametrize(
    'exif',
    [
        *(orientation(0), orientation(9), orientation(6)[:-9], b'Exif\0\0'),
        *(b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0nonsense', orientation(6)[:9]),
    ],
)
def test_orientation_that_makes_no_sense(tmp_path, exif):
    """The image is taken as it is, which mmcv does too."""
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', SIZE).save(path, exif=exif)
    with Image.open(path) as image:
        assert image_size(image) == SIZE
    assert mmcv.imread(path).shape[1::-1] == SIZE


def test_unpaired_image_and_mask(ade20k):
    mask = ade20k / 'annotations/training/1.png'
    mask.rename(mask.with_name('lonely.png'))
    image, mask = problems(check_ade20k(ade20k, counts=COUNTS))
    assert 'without a partner' in image and image.endswith(': 1.jpg')
    assert 'without a partner' in mask and mask.endswith(': lonely')


@pytest.mark.parametrize(
    'labels, expected',
    [
        (np.full((8, 12), 151), 'labels above 150'),
        (np.zeros((8, 11)), 'another size'),
        (np.zeros((8, 12, 3)), 'one 8-bit channel'),
        (np.full((8, 12), 150), None),
    ],
)
def test_label_maps(ade20k, labels, expected):
    save_mask(ade20k / 'annotations/validation/0.png', labels)
    found = problems(check_ade20k(ade20k, counts=COUNTS))
    assert len(found) == (expected is not None)
    assert all(expected in problem for problem in found)


def test_coco_annotations(coco):
    content = read_annotations(coco, 'train2017')
    content['annotations'][0]['category_id'] = 81
    content['annotations'][1]['image_id'] = 7
    content['images'][2]['file_name'] = 'gone.jpg'
    content['images'][1]['width'] += 1
    del content['categories'][-1]
    write_annotations(coco, 'train2017', **content)
    text = '\n'.join(problems(check_coco(coco, counts=COUNTS)))
    for expected in (
        '79 categories',
        '1 annotations with an unknown category_id',
        '1 annotations with an unknown image_id',
        'gone.jpg',
        'another size than annotated',
    ):
        assert expected in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize('content', ['', '[]', '{"images": []}'])
def test_coco_without_annotations(coco, content):
    (coco / 'annotations/instances_val2017.json').write_text(content)
    (found,) = check_coco(coco, counts=COUNTS)
    assert 'instances_val2017.json' in found.problem
    assert 'annotations_trainval2017.zip' in found.fix


def test_imagenet_classes(imagenet):
    (imagenet / 'val/n1').rename(imagenet / 'val/n3')
    (found,) = problems(check_small_imagenet(imagenet))
    assert '2 class folders are in only one' in found and 'n1, n3' in found


def test_imagenet_without_class_folders(imagenet):
    for image in (imagenet / 'val').glob('*/*'):
        image.rename(imagenet / 'val' / image.name)
        image.parent.rmdir()
    (found,) = check_small_imagenet(imagenet)
    assert '2 images lie in' in found.problem
    # What mmpretrain reads then is a list.
    (imagenet / 'meta').mkdir()
    (imagenet / 'meta/val.txt').write_text('0.JPEG 0\n1.JPEG 1\n')
    assert check_small_imagenet(imagenet) == []


def test_imagenet_lists(imagenet):
    (imagenet / 'meta').mkdir()
    (imagenet / 'meta/val.txt').write_text('n0/0.JPEG 0\nn1/1.JPEG 2\nn1/5.JPEG 1\n')
    missing, wrong = problems(check_small_imagenet(imagenet))
    assert '1 images' in missing and missing.endswith('n1/5.JPEG')
    assert '1 labels' in wrong and wrong.endswith('n1/1.JPEG 2')


def test_examples_are_few(ade20k):
    for split in ('training', 'validation'):
        for image in (ade20k / 'images' / split).iterdir():
            for i in range(10):
                image.with_name(f'{image.stem}_{i}.jpg').write_bytes(b'')
    found = problems(check_ade20k(ade20k, counts=COUNTS))
    assert any('and 27 more' in problem for problem in found)
