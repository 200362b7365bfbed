# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Annotations in COCO's format: the file, what is wrong, and the way out."""

import json

import pytest
from mmengine.registry import DATASETS, DefaultScope

from mlla_mm.checks.data import check_data, require_data

from .. import bad_data
from ..bad_data import (
    DET,
    HEIGHT,
    PREFIX,
    WIDTH,
    assert_refused,
    assert_says,
    coco_content,
    config,
    empty,
    noise,
    rename,
    save,
    truncate,
    turn,
    web_page,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


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
    (finding,) = check_data(cfg, 'train').findings
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
    (finding,) = check_data(config(DET, coco), 'train').findings
    assert_says(finding.problem, f'1 images in {coco}/images', *words)
    found = check_data(config(DET, coco), 'train', look='files').findings
    assert found == ([finding] if case == 'zero bytes' else [])
    assert check_data(config(DET, coco), 'train', look='names').findings == []


@pytest.mark.parametrize('orientation', [2, 3, 4])
def test_images_that_are_turned_within_their_frame(coco, orientation):
    turn(orientation)(coco / 'images/1.jpg')
    assert check_data(config(DET, coco), 'train').findings == []
