# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Data that do not fit a config: the file, what is wrong, and the way out."""

import json

import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from mlla_mm.checks.data import check_data, check_splits, require_data

from .. import bad_data
from ..bad_data import (  # fmt: skip
    CLS,
    DET,
    HEIGHT,
    SEG,
    WIDTH,
    assert_says,
    coco_content,
    config,
    empty,
    noise,
    save,
    truncate,
    turn,
    web_page,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


@pytest.fixture
def coco(tmp_path):
    return bad_data.make_coco(tmp_path)


@pytest.fixture
def masks(tmp_path):
    return bad_data.make_masks(tmp_path)


@pytest.fixture
def folders(tmp_path):
    return bad_data.make_folders(tmp_path)


# Annotations in COCO's format.


def change(entries, **values):
    """Change the second item of a list in the annotation file. None removes a key."""

    def apply(root):
        content = coco_content()
        for key, value in values.items():
            content[entries][1][key] = value
            if value is None:
                del content[entries][1][key]
        (root / 'coco.json').write_text(json.dumps(content))

    return apply


def annotate(**values):
    return change('annotations', **values)


def write(text):
    return lambda root: (root / 'coco.json').write_text(text)


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


PREFIX = 'data_prefix of train_dataloader'
FORMAT = 'docs/datasets.md'
BOX = '[x, y, width, height]'
NO_LISTS = '{"images": [], "annotations": []'
# What is done to the data, the file that is named, and what else the error says.
COCO_ERRORS = {
    'no file': (lambda root: (root / 'coco.json').unlink(),
                'coco.json', 'ann_file of train_dataloader'),
    'pipe': (lambda root: bad_data.pipe(root / 'coco.json'), 'coco.json', 'not found'),
    'empty file': (write(''), 'coco.json', 'empty', 'again'),
    'no JSON': (write('<html>'), 'coco.json', 'JSON', 'line 1 column 1', 'again'),
    'cut off': (write('{"images": ['), 'coco.json', 'JSON', 'line 1 column 13'),
    'a list': (write('[]'), 'coco.json', 'images, annotations, categories', FORMAT),
    'no categories': (write(NO_LISTS + '}'), 'coco.json', 'categories', FORMAT),
    'no images': (write(NO_LISTS + ', "categories": []}'),
                  'coco.json', 'no images', FORMAT),
    'no file_name': (change('images', file_name=None),
                     'coco.json', 'images', 'file_name', 'number 1.', FORMAT),
    'number as file_name': (change('images', file_name=1),
                            'coco.json', 'images', 'file_name', 'number 1.', FORMAT),
    'list as id': (annotate(image_id=[1]),
                   'coco.json', 'annotations', 'image_id', 'number 1.', FORMAT),
    'null as area': (lambda root: write(json.dumps(coco_content()).replace(
        '"area": 400', '"area": null'))(root), 'coco.json', 'area', 'number 0', FORMAT),
    'not UTF-8': (lambda root: (root / 'coco.json').write_bytes(b'{"\xff": 1}'),
                  'coco.json', 'UTF-8', 'again'),
    'no bbox': (annotate(bbox=None), 'coco.json', 'bbox', 'number 1.', FORMAT),
    'no area': (annotate(area=None), 'coco.json', 'area', 'number 1.', FORMAT),
    'no image folder': (rename('images', 'pictures'), 'images', 'not found', PREFIX),
    'absent image': (lambda root: (root / 'images/2.jpg').unlink(),
                     'images: 2.jpg', PREFIX),
    'negative width': (annotate(bbox=[24, 24, -20, 20]),
                       'coco.json: id 1.', 'negative width', BOX),
    'NaN': (annotate(bbox=[4, float('nan'), 20, 20]), 'coco.json: id 1.', 'NaN', BOX),
    'infinity': (annotate(bbox=[4, 4, float('inf'), 20]),
                 'coco.json: id 1.', 'infinity', BOX),
    'three numbers': (annotate(bbox=[4, 4, 20]),
                      'coco.json: id 1.', 'not four numbers', BOX),
    'text': (annotate(bbox=['4', '4', '20', '20']),
             'coco.json: id 1.', 'not four numbers', BOX),
    'category out of range': (annotate(category_id=10),
                              'coco.json: id 1.', 'category_id', 'categories'),
    'unknown image': (annotate(image_id=7), 'coco.json: id 1.', 'image_id', 'images'),
    'id twice': (annotate(id=0), 'coco.json: 0.', 'more than once'),
    'empty mask': (annotate(segmentation=[]), 'coco.json: id 1.', 'no mask', FORMAT),
    'absent mask': (annotate(segmentation=None),
                    'coco.json: id 1.', 'no mask', FORMAT),
    'other name of a class': (change('categories', name='one'), 'coco.json: 1.',
                              '0, one, 2 and 7 more', 'metainfo.classes'),
}  # fmt: skip


def assert_refused(scope, root, file, *words):
    with pytest.raises(ValueError) as caught:
        require_data(config(scope, root), 'train')
    assert_says(caught.value, root / file, *words)


@pytest.mark.parametrize('case', COCO_ERRORS)
@pytest.mark.usefixtures('no_waiting')
def test_coco_annotations(coco, case):
    spoil, *words = COCO_ERRORS[case]
    spoil(coco)
    assert_refused(DET, coco, *words)


def test_annotations_of_test_images_may_be_unpublished(coco):
    content = coco_content()
    del content['annotations']
    (coco / 'coco.json').write_text(json.dumps(content))
    cfg = config(DET, coco)
    cfg.test_dataloader = cfg.val_dataloader
    require_data(cfg, 'test')
    with pytest.raises(ValueError, match='has no list of annotations'):
        require_data(cfg, 'val')


def test_boxes_of_no_size_are_left_out_and_reported(coco):
    """mmdet leaves them out, too. COCO itself has such boxes."""
    annotate(bbox=[4, 4, 0, 20])(coco)
    cfg = config(DET, coco)
    require_data(cfg, 'train')
    (finding,) = check_data(cfg, 'train')
    assert_says(finding.problem, 'no width or height', f'{coco}/coco.json: id 1')
    with DefaultScope.overwrite_default_scope(DET):
        cfg.train_dataloader.dataset.filter_cfg = None
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert [len(dataset.get_data_info(i)['instances']) for i in range(3)] == [1, 0, 1]


IMAGE_FINDINGS = {
    'truncated': (truncate, 'cannot be read', '1.jpg is truncated'),
    'zero bytes': (empty, 'cannot be read', '1.jpg is empty'),
    'web page': (web_page, 'cannot be read', '1.jpg is not an image'),
    'other size': (lambda path: save(path, noise(HEIGHT, WIDTH + 1, 3)),
                   'another size than annotated: 1.jpg'),
    # mmcv turns images, so boxes have to refer to the turned one.
    **{f'turned: {number}': (turn(number), 'another size than annotated: 1.jpg')
       for number in (5, 6, 7, 8)},
}  # fmt: skip


@pytest.mark.parametrize('case', IMAGE_FINDINGS)
def test_images_of_coco(coco, case):
    spoil, *words = IMAGE_FINDINGS[case]
    spoil(coco / 'images/1.jpg')
    (finding,) = check_data(config(DET, coco), 'train')
    assert_says(finding.problem, f'1 images in {coco}/images', *words)
    found = check_data(config(DET, coco), 'train', look='files')
    assert found == ([finding] if case == 'zero bytes' else [])
    assert check_data(config(DET, coco), 'train', look='names') == []


@pytest.mark.parametrize('orientation', [2, 3, 4])
def test_images_that_are_turned_within_their_frame(coco, orientation):
    turn(orientation)(coco / 'images/1.jpg')
    assert check_data(config(DET, coco), 'train') == []


# Label maps.


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
    (finding,) = check_data(config(SEG, masks), 'train')
    assert_says(finding.problem, problem, f'1 images in {masks}/images')
    assert finding.fatal == (case != 'empty')


def test_labels_that_are_classes(masks):
    """11 classes: 0 to 10, or 1 to 11 if 0 is unlabelled; 255 always is."""
    cfg = config(SEG, masks)
    labels(HEIGHT, WIDTH, value=255)(masks)
    save(masks / 'maps/2.png', np.full((HEIGHT, WIDTH), 11, np.uint8))
    cfg.train_dataloader.dataset.reduce_zero_label = False
    above, unlabelled = check_data(cfg, 'train')
    assert_says(above.problem, 'labels above 10: 0.jpg, 2.jpg', f'{masks}/images')
    assert_says(unlabelled.problem, 'no labelled pixel: 1.jpg')


# Class folders.


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
    without, of_no_bytes = check_data(config(CLS, folders), 'train')
    assert_says(without.problem, 'without an image', f'{folders}/train: 3')
    assert_says(of_no_bytes.problem, f'{folders}/train', '4/image.png is empty')
    assert_says(of_no_bytes.problem, r'5/\x1b[31m\n.png is empty')
    assert of_no_bytes.problem.isprintable()


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
    found = check_data(config(scope, tmp_path), 'train')
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
        assert check_data(cfg, 'train') == check_data(cfg, 'val') == []
        assert check_data(cfg, 'test') is not None  # it names data that are missing


def test_data_sets_without_a_check(folders):
    cfg = config(CLS, folders)
    cfg.train_dataloader.dataset = dict(type='CIFAR10', data_root='nowhere')
    assert check_data(cfg, 'train') is None
    require_data(cfg, 'train')
    assert check_splits(cfg) == []
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
    (finding,) = check_splits(cfg)
    assert_says(finding.problem, 'in only one of train and val: 3, x')
    with pytest.raises(ValueError, match='in only one of train and val: 3, x'):
        require_data(cfg, 'train', 'val')
    cfg.train_dataloader.dataset.with_label = False
    assert check_splits(cfg) == []


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_images_are_read_as_in_training(folders, backend):
    """Pillow reads TIFF files of 32 bits, and OpenCV does not."""
    path = folders / 'train/3/image.png'
    Image.new('I', (8, 8)).save(path, format='TIFF')
    cfg = config(CLS, folders)
    cfg.train_dataloader.dataset.pipeline[0].imdecode_backend = backend
    found = [finding.problem for finding in check_data(cfg, 'train')]
    assert len(found) == (backend == 'cv2')
    assert_says(found, *['3/image.png cannot be decoded by OpenCV'] * len(found))


def test_missing_data():
    with pytest.raises(ValueError, match='nowhere'):
        require_data(config(CLS, 'nowhere'), 'train')
