# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Annotations in COCO's format: the file, what is wrong, and the way out."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope

from mlla_mm.checks.coco import fix_coco, read_coco
from mlla_mm.checks.data import _sources, check_data, is_coco, require_data
from mlla_mm.datasets import digits

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
from mmdet.evaluation import CocoMetric  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402


def edit(*changes):
    """Change the content of the annotation file."""

    def apply(root):
        content = coco_content()
        for alter in changes:
            alter(content)
        (root / 'coco.json').write_text(json.dumps(content))

    return apply


def each(entries, *numbers, **values):
    """Change some items of a list, the second by default. ``...`` removes a key."""

    def alter(content):
        for i in numbers or (1,):
            content[entries][i].update(values)
            for key in [key for key, value in values.items() if value is ...]:
                del content[entries][i][key]

    return alter


def change(entries, *numbers, **values):
    return edit(each(entries, *numbers, **values))


def annotate(*numbers, **values):
    return change('annotations', *numbers, **values)


def mask(segmentation):
    return annotate(segmentation=segmentation)


def many(alter):
    """Two thousand annotations, so that one is rare."""

    def apply(content):
        alter(content)
        good = content['annotations'][0]
        content['annotations'] += [
            dict(good, id=i, category_id=i % 10) for i in range(11, 2001)
        ]

    return apply


def reverse(content):
    content['categories'].reverse()


def same_name(content):
    """Category 10 is another one of the name '1', before class '2'."""
    content['categories'].insert(2, dict(id=10, name='1'))
    content['annotations'].append(
        dict(content['annotations'][1], id=11, category_id=10)
    )


def unused_category(content):
    content['categories'].insert(0, dict(id=10, name='0', supercategory='none'))


def write(text):
    return lambda root: (root / 'coco.json').write_text(text)


FORMAT = 'docs/datasets.md'
BOX = '[x, y, width, height]'
NO_LISTS = '{"images": [], "annotations": []'
# What is done to the data, and what the error says.
COCO_ERRORS = {
    'no file': (lambda root: (root / 'coco.json').unlink(),
                'coco.json', 'ann_file of train_dataloader'),
    'pipe': (lambda root: bad_data.pipe(root / 'coco.json'), 'coco.json', 'not found'),
    'empty file': (write(''), 'coco.json', 'empty', 'again'),
    'no JSON': (write('<html>'), 'coco.json', 'JSON', 'line 1 column 1', 'again'),
    'deep JSON': (write('[' * 100000), 'coco.json', 'not JSON'),
    'cut off': (write('{"images": ['), 'coco.json', 'JSON', 'line 1 column 13'),
    'a list': (write('[]'), 'coco.json', 'images, annotations, categories', FORMAT),
    'no categories': (write(NO_LISTS + '}'), 'coco.json', 'categories', FORMAT),
    'no images': (write(NO_LISTS + ', "categories": []}'),
                  'coco.json', 'no images', FORMAT),
    'empty categories': (edit(lambda content: content.update(categories=[])),
                         'coco.json', 'no categories', FORMAT),
    'no file_name': (change('images', file_name=...),
                     'coco.json', 'images', 'file_name', 'number 1.', FORMAT),
    'number as file_name': (change('images', file_name=1),
                            'coco.json', 'images', 'file_name', 'number 1.', FORMAT),
    'list as id': (annotate(image_id=[1]),
                   'coco.json', 'annotations', 'image_id', 'number 1.', FORMAT),
    'not UTF-8': (lambda root: (root / 'coco.json').write_bytes(b'{"\xff": 1}'),
                  'coco.json', 'UTF-8', 'again'),
    'no bbox': (annotate(bbox=...), 'coco.json', 'bbox', 'number 1.', FORMAT),
    'no image folder': (rename('images', 'pictures'), 'images', 'not found', PREFIX),
    'absent image': (lambda root: (root / 'images/2.jpg').unlink(),
                     'images: 2.jpg', PREFIX),
    # Boxes.
    'negative width': (annotate(bbox=[24, 24, -20, 20]), '1 of 10', 'coco.json',
                       'negative width', 'id 2.', 'leaves', BOX, 'two corners'),
    'NaN': (annotate(bbox=[4, float('nan'), 20, 20]),
            'coco.json', 'id 2.', 'finite', BOX),
    'infinity': (annotate(bbox=[4, 4, float('inf'), 20]),
                 'coco.json', 'id 2.', 'finite', BOX),
    'three numbers': (annotate(bbox=[4, 4, 20]),
                      'id 2.', 'four finite numbers', BOX),
    'text': (annotate(bbox=['4', '4', '20', '20']),
             'id 2.', 'four finite numbers', BOX),
    'null in a box': (annotate(bbox=[4, 4, None, 20]), 'four finite numbers', BOX),
    'no width': (annotate(bbox=[4, 4, 0, 20]),
                 '1 of 10 annotations', 'coco.json', 'less than a pixel', 'id 2.'),
    'tiny box': (annotate(3, 4, bbox=[4, 4, 9, 0.9]),
                 '2 of 10', 'less than a pixel', 'id 4, id 5.', 'leaves'),
    'fractions': (annotate(*range(10), bbox=[0.1, 0.1, 0.5, 0.5]),
                  '10 of 10', 'id 1, id 2, id 3 and 7 more', 'fractions'),
    'outside': (annotate(bbox=[60, 4, 20, 20]),
                '1 of 10', 'outside', 'coco.json', 'id 2.', 'leaves'),
    'outside to the left': (annotate(bbox=[-20, 4, 20, 20]), 'outside', 'id 2.'),
    'corners': (annotate(*range(10), bbox=[35, 20, 55, 39]),
                '10 of 10', 'sticks out', 'id 1,', 'two corners', BOX),
    # Areas.
    'no area': (annotate(area=...), 'coco.json', 'area', 'id 2.', 'pixels of the mask'),
    'text as area': (annotate(area='400'), 'coco.json', 'area', 'id 2.'),
    'area 0': (annotate(area=0), '1 of 10', 'coco.json', 'area of 0', 'id 2.'),
    'negative area': (annotate(area=-400), 'area of 0 or less', 'id 2.', 'leaves'),
    # Ids.
    'no id': (annotate(id=...), 'coco.json', 'no usable id', 'number 1.', 'from 1'),
    'null as id': (annotate(id=None), 'no usable id', 'number 1.', 'from 1'),
    'NaN as id': (annotate(id=float('nan')), 'no usable id', 'number 1.', 'from 1'),
    'id twice': (annotate(id=1), 'coco.json: 1.', 'more than once'),
    'image twice': (change('images', id=0),
                    'images', 'coco.json: 0.', 'more than once'),
    'category out of range': (annotate(category_id=10),
                              'coco.json: id 2.', 'category_id', 'categories'),
    'category as text': (annotate(category_id='1'),
                         'coco.json', 'text as category_id', 'id 2.', 'numbers'),
    'text as id of an image': (annotate(image_id='1'),
                               'coco.json', 'text as image_id', 'id 2.', 'numbers'),
    'image of no size': (change('images', width=0), 'coco.json', 'positive', '1.jpg'),
    'file under two ids': (change('images', file_name='./0.jpg'),
                           'coco.json', 'several ids', ': 0.jpg', 'once'),
    'text as crowd': (annotate(iscrowd='0'), 'coco.json', 'iscrowd', 'id 2.', 'quotes'),
    # Categories.
    'other name of a class': (change('categories', name='one'), 'coco.json: 1.',
                              '0, one, 2 and 7 more', 'metainfo.classes'),
    'hostile name': (change('categories', name='1\x1b'),
                     r"Is '1\x1b' meant?"),
    'number as name': (change('categories', name=1), 'coco.json', 'numbers', '1.',
                       'quotes'),
    'absent class': (edit(lambda content: content['categories'].pop()),
                     'coco.json: 9.', 'metainfo.classes'),
    'name twice': (edit(same_name), 'coco.json: 1.', 'more than once', 'own name'),
    'another order': (edit(reverse), 'coco.json', 'order', "'9' in place of '0'"),
    # Masks.
    'empty mask': (mask([]), 'coco.json: id 2.', 'no mask', FORMAT),
    'absent mask': (mask(...), 'coco.json: id 2.', 'no mask', FORMAT),
    'two corners as mask': (mask([[4, 4, 24, 24]]),
                            '1 of 10', 'three points', 'id 2.', 'leaves'),
    'flat mask': (mask([4, 4, 24, 4, 24, 24]),
                  'coco.json: id 2.', 'no list of polygons'),
    'deep mask': (mask([[[4, 4, 24, 4, 24, 24]]]), 'no list of coordinates', 'id 2.'),
    'far away': (mask([[4, 4, 24, 4, 24, 1e9]]), 'coordinates', 'id 2.'),
    'text as mask': (mask('4 4 24'), 'neither polygons', 'id 2.'),
    'RLE without size': (mask(dict(counts=[0, 2400])), '1 of 10', 'size', 'id 2.'),
    'turned RLE': (mask(dict(size=[WIDTH, HEIGHT], counts=[0, 2400])),
                   'coco.json: id 2.', 'another size', '[height, width]'),
    'short RLE': (mask(dict(size=[HEIGHT, WIDTH], counts=[0, 2399])),
                  'coco.json: id 2.', 'not all pixels'),
    'text in RLE': (mask(dict(size=[HEIGHT, WIDTH], counts=[0, 'x'])), 'all pixels'),
    # Filters.
    'no annotations': (edit(lambda content: content['annotations'].clear()),
                       'None of 3 images', 'coco.json', '3 have no object', 'indices'),
    'small images': (edit(each('images', 0, 1, 2, width=20),
                          each('annotations', *range(10), bbox=[4, 4, 9, 20])),
                     'None of 3 images', 'coco.json', '3 are smaller than min_size=32'),
}  # fmt: skip


@pytest.mark.parametrize('case', COCO_ERRORS)
@pytest.mark.usefixtures('no_waiting')
def test_coco_annotations(coco, case):
    spoil, *words = COCO_ERRORS[case]
    spoil(coco)
    assert_refused(DET, coco, '', *words)


# What is read only by an evaluation.
EVALUATION_ERRORS = {
    'no iscrowd': (annotate(iscrowd=...),
                   'coco.json', 'iscrowd', 'id 2.', '"iscrowd": 0'),
    'null as iscrowd': (annotate(iscrowd=None), 'iscrowd', 'id 2.', '"iscrowd": 0'),
    'id 0': (annotate(id=0), 'coco.json', 'id of 0', 'id 0.', 'from 1'),
    'id of text': (annotate(id='x'), 'coco.json', 'no number', 'id x.', 'from 1'),
    'NaN as area': (annotate(area=float('nan')), 'coco.json', 'NaN', 'id 2.'),
    'mixed ids of images': (edit(each('images', id='x'),
                                 each('annotations', 1, 4, 7, image_id='x')),
                            'ids of images', 'text', 'x.', 'sort'),
    'first polygon': (mask([[4, 4, 9, 9], [4, 4, 24, 4, 24, 24]]),
                      'first polygon', 'coco.json: id 2.', FORMAT),
    'mask of a tiny box': (edit(many(each('annotations', bbox=[4, 4, 20, 0.5],
                                          segmentation=[]))),
                           'no mask', 'coco.json: id 2.', FORMAT),
}  # fmt: skip


@pytest.mark.parametrize('case', EVALUATION_ERRORS)
def test_what_only_an_evaluation_reads(coco, case):
    spoil, *words = EVALUATION_ERRORS[case]
    spoil(coco)
    cfg = config(DET, coco)
    require_data(cfg, 'train')
    with pytest.raises(ValueError) as caught:
        require_data(cfg, 'val')
    assert_says(caught.value, *words)
    # mmdet makes its own annotations without the file.
    cfg.val_evaluator = dict(type='CocoMetric', metric='bbox')
    require_data(cfg, 'val')


RARE = {
    'no width': (dict(bbox=[4, 4, 0, 20]), '1 of 2000', 'less than a pixel'),
    'negative width': (dict(bbox=[24, 4, -20, 20]), '1 of 2000', 'negative width'),
    'outside': (dict(bbox=[60, 4, 20, 20]), '1 of 2000', 'outside'),
    'area 0': (dict(area=0), '1 of 2000', 'area of 0'),
    'two corners as mask': (dict(segmentation=[[4, 4, 24, 24]]), '1 of 2000', 'points'),
    'one bad polygon': (dict(segmentation=[[4, 4, 24, 4, 24, 24], [4, 4]]), 'later'),
    'last polygon': (dict(segmentation=[[4, 4], [4, 4, 24, 4, 24, 24]]), 'first'),
}


@pytest.mark.parametrize('case', RARE)
def test_what_is_rare_is_left_out_and_reported(coco, case):
    """COCO itself has boxes of no width."""
    values, *words = RARE[case]
    edit(many(each('annotations', **values)))(coco)
    cfg = config(DET, coco)
    report = require_data(cfg, 'train')
    (finding,) = report.findings
    assert_says(finding.problem, *words, 'coco.json', 'id 2')
    dataset = mmdet_dataset(cfg)
    kept = [x for i in range(3) for x in dataset.get_data_info(i)['instances']]
    left_out = ('no width', 'negative width', 'outside', 'area 0')
    assert len(kept) == 2000 - (case in left_out)
    assert sum(report.counts['train'].numbers) == len(kept)


def mmdet_dataset(cfg, split='train'):
    with DefaultScope.overwrite_default_scope(DET):
        return DATASETS.build(cfg[f'{split}_dataloader'].dataset)


def test_boxes_that_stick_out(coco):
    # One box may look like two corners by chance.
    for box in ([50, 4, 20, 20], [35, 20, 55, 39]):
        annotate(1, bbox=box)(coco)
        (finding,) = require_data(config(DET, coco), 'train').findings
        assert_says(finding.problem, '1 of 10', 'sticks out', 'id 2')
    for box in ([50, 4, 10.9, 20], [-0.9, -0.9, 20, 20], [59, 39, 1, 1]):
        annotate(1, bbox=box)(coco)
        assert require_data(config(DET, coco), 'train').findings == []
    # These are no corners.
    annotate(*range(10), bbox=[-2, -2, 58, 38])(coco)
    (finding,) = require_data(config(DET, coco), 'train').findings
    assert_says(finding.fix, 'another size')


def test_masks_matter_where_they_are_read(coco):
    mask([])(coco)
    cfg = config(DET, coco)
    for split in ('train', 'val'):
        steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
        cfg[f'{split}_dataloader'].dataset.pipeline = steps
    assert require_data(cfg, 'train').findings == []
    with pytest.raises(ValueError, match='no mask'):
        require_data(cfg, 'val')
    cfg.val_evaluator.metric = 'bbox'
    assert require_data(cfg, 'val').findings == []
    # mmdet takes no run-length encoding as a polygon.
    cfg.train_dataloader.dataset.pipeline[1].update(with_mask=True, poly2mask=False)
    mask(dict(size=[HEIGHT, WIDTH], counts=[0, 2400]))(coco)
    with pytest.raises(ValueError, match=r'1 of 10 .* poly2mask=False .*: id 2'):
        require_data(cfg, 'train')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_only_some_categories_are_classes(coco, split):
    """What is wrong with others does not matter."""
    edit(with_others)(coco)
    assert require_data(config(DET, coco), split).findings == []
    assert score(with_others(coco_content()), 'segm', range(10)) == 1


def with_others(content):
    content['categories'] += [dict(id=i, name='other') for i in (10, 11)]
    for i, values in enumerate(
        (
            dict(area=0),
            dict(bbox=[99, 4, 20, 20]),
            dict(id=0, area=float('nan')),
            dict(iscrowd='0'),
            dict(iscrowd=None, segmentation=[]),
        )
    ):
        new = dict(content['annotations'][0], id=11 + i, category_id=10 + i % 2)
        content['annotations'].append(dict(new, **values))
    return content


def test_images_listed_again(coco):
    """Scripts list an image for each of its objects, or keep objects of others."""
    edit(lambda content: content['images'].append(content['images'][0]))(coco)
    for split in ('train', 'val'):
        report = require_data(config(DET, coco), split)
        assert report.findings == [] and report.counts[split].images == 3
    annotate(1, 4, image_id=7)(coco)
    cfg = config(DET, coco)
    cfg.allow_empty_classes = True
    findings = require_data(cfg, 'train').findings
    assert_says(findings[0].problem, 'coco.json: id 2, id 5', 'unknown image_id')
    assert len(mmdet_dataset(cfg)) == 3


def test_most_objects_are_crowds(coco):
    """CVAT writes masks as crowds."""

    def repeat(content):
        for i in range(11, 31):
            crowd = dict(content['annotations'][i % 10], id=i, iscrowd=1)
            content['annotations'].append(crowd)

    edit(repeat)(coco)
    (finding,) = require_data(config(DET, coco), 'train').findings
    assert_says(finding.problem, '20 of 30 objects', 'coco.json', 'crowds')


def test_images_listed_twice_with_the_same_objects(coco):
    def repeat(content):
        content['images'].append(dict(content['images'][0], id=3))
        again = [x for x in content['annotations'] if x['image_id'] == 0]
        for i, annotation in enumerate(again, 11):
            content['annotations'].append(dict(annotation, id=i, image_id=3))

    edit(repeat)(coco)
    report = require_data(config(DET, coco), 'train')
    (finding,) = report.findings
    assert_says(finding.problem, 'several ids', 'same objects', '0.jpg')
    assert report.counts['train'].images == 4


def test_annotations_of_test_images_may_be_unpublished(coco):
    content = coco_content()
    del content['annotations']
    (coco / 'coco.json').write_text(json.dumps(content))
    cfg = config(DET, coco)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    counts = require_data(cfg, 'test').counts['test']
    assert counts.images == 3 and counts.numbers is None
    with pytest.raises(ValueError, match='has no list of annotations'):
        require_data(cfg, 'val')


def test_crowds_alone(coco):
    """There is nothing to learn, and nothing to measure: the score is -1."""
    annotate(*range(10), iscrowd=1)(coco)
    for split in ('train', 'val'):
        with pytest.raises(
            ValueError, match=r'10 of 10 .*coco.json .* crowds.* ignored\.$'
        ):
            require_data(config(DET, coco), split)


def test_counts_are_those_after_the_filters(coco):
    edit(
        each('annotations', 0, 1, iscrowd=1),
        each('annotations', 2, ignore=1),
        each('images', 2, height=31),
    )(coco)
    cfg = config(DET, coco)
    cfg.allow_empty_classes = True
    before = (coco / 'coco.json').read_bytes()
    counts = require_data(cfg, 'train').counts['train']
    assert (coco / 'coco.json').read_bytes() == before
    # The third image has annotations 3, 6 and 9.
    assert counts.images == len(mmdet_dataset(cfg)) == 2
    assert counts.numbers == counts.images_with == [0, 0, 0, 1, 1, 0, 1, 1, 0, 1]
    cfg.train_dataloader.dataset.indices = 1
    counts = require_data(cfg, 'train').counts['train']
    assert counts.images == 1 and counts.numbers == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize('look', ['names', 'pixels'])
def test_digits_have_no_finding(tmp_path, look):
    cfg = config(DET)
    root = digits.make_coco(tmp_path / 'data', train=20, val=20, size=64)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(root)
    cfg.val_evaluator.ann_file = f'{root}/annotations/instances_val.json'
    report = check_data(cfg, 'train', 'val', look=look)
    assert report.findings == []
    for split, counts in report.counts.items():
        file = root / f'annotations/instances_{split}.json'
        assert sum(counts.numbers) == len(json.loads(file.read_text())['annotations'])


# What pycocotools makes of it.


def score(content, metric='bbox', categories=None):
    """Average precision of perfect predictions."""
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        shapes = dict(bbox='bbox', segm='segmentation')
        results = [
            {
                'image_id': x['image_id'],
                'category_id': x['category_id'],
                'score': 1.0,
                shapes[metric]: x['bbox'] if metric == 'bbox' else truth.annToRLE(x),
            }
            for x in content['annotations']
            if categories is None or x['category_id'] in categories
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), metric)
        if categories is not None:
            evaluation.params.catIds = list(categories)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(evaluation.stats[0], 9)


def spoilt(*changes):
    content = coco_content()
    for alter in changes:
        alter(content)
    return content


def test_pycocotools():
    """The reasons of the rules: what it does not say, or says too late."""
    assert score(coco_content()) == score(coco_content(), 'segm') == 1
    assert score(spoilt(each('annotations', id=0))) == pytest.approx(0.9)
    for values, metric, error in (
        (dict(iscrowd=...), 'bbox', KeyError),
        (dict(iscrowd=None), 'bbox', TypeError),
        (dict(area=...), 'bbox', KeyError),
        (dict(id='x'), 'bbox', ValueError),
        (dict(segmentation=[[4, 4, 24, 24]]), 'segm', TypeError),
        (dict(segmentation=[[4, 4], [4, 4, 24, 4, 24, 24]]), 'segm', Exception),
        (dict(segmentation=[]), 'segm', IndexError),
        (dict(segmentation=dict(counts=[0, 2400])), 'segm', Exception),
    ):
        with pytest.raises(error):
            score(spoilt(each('annotations', **values)), metric)
    # The object is ignored, as if it were a crowd.
    content = spoilt(each('annotations', iscrowd='0', bbox=[4, 4, 1, 1]))
    assert score(content) == 1
    mixed = each('images', id='x'), each('annotations', 1, 4, 7, image_id='x')
    with pytest.raises(TypeError):
        score(spoilt(*mixed))


def test_mmdet_takes_a_category_of_the_same_name_for_another_class(coco):
    edit(same_name)(coco)
    cfg = config(DET, coco)
    dataset = mmdet_dataset(cfg)
    infos = [dataset.get_data_info(i) for i in range(3)]
    labels = [x['bbox_label'] for info in infos for x in info['instances']]
    # Label 10 is the background of a head of ten classes.
    assert len(dataset.cat_ids) == 11 and max(labels) == 10


def test_mmdet_numbers_classes_in_the_order_of_the_file(coco):
    edit(reverse)(coco)
    dataset = mmdet_dataset(config(DET, coco))
    objects = dataset.get_data_info(0)['instances']
    # Of the categories 0, 3, 6 and 9.
    assert [x['bbox_label'] for x in objects] == [9, 6, 3, 0]
    assert dataset.metainfo['classes'] == tuple(map(str, range(10)))


def test_results_of_classes_that_are_not_in_order(coco):
    """The metric sorts the results by ids, and the names as they are in the file."""
    ids = {0: 1, 1: 0}

    def swap(content):
        for category in content['categories'][:2]:
            category['id'] = ids[category['id']]
        for annotation in content['annotations'][:2]:
            annotation['category_id'] = ids[annotation['category_id']]

    edit(swap)(coco)
    metric = CocoMetric(ann_file=str(coco / 'coco.json'), classwise=True)
    metric.dataset_meta = dict(classes=tuple(map(str, range(10))))
    box = np.array([[4.0, 4, 24, 24]])
    # Class '0' alone is found. It is in image 0.
    results = [
        dict(img_id=i, bboxes=box[:n], scores=np.ones(n), labels=np.zeros(n, int))
        for i, n in ((0, 1), (1, 0), (2, 0))
    ]
    with redirect_stdout(io.StringIO()):
        scores = metric.compute_metrics([({}, result) for result in results])
    assert scores['0_precision'] == 0 and scores['1_precision'] == 1
    cfg = config(DET, coco)
    require_data(cfg, 'val')
    cfg.val_evaluator.classwise = True
    with pytest.raises(ValueError, match='coco.json do not ascend.* ascending order'):
        require_data(cfg, 'val')
    text = [dict(id=f'c{i}', name=str(i)) for i in range(10)]
    edit(
        lambda content: content.update(categories=text),
        *(each('annotations', i, category_id=f'c{i}') for i in range(10)),
    )(coco)
    with pytest.raises(ValueError, match='10 ids of categories in .* are text: c0, c1'):
        require_data(cfg, 'val')
    metric = CocoMetric(ann_file=str(coco / 'coco.json'), classwise=True)
    metric.dataset_meta = dict(classes=tuple(map(str, range(10))))
    with redirect_stdout(io.StringIO()), pytest.raises(KeyError):
        metric.compute_metrics([({}, result) for result in results])


# Repairs.

RLE = dict(size=[HEIGHT, WIDTH], counts=[0, 100, 2300])
AREA = 'area of 1 annotations computed from their mask'
REPAIRS = {
    'no iscrowd': ([each('annotations', iscrowd=...)], 'iscrowd of 1 annotations'),
    'null as iscrowd': ([each('annotations', iscrowd=None)], 'iscrowd of 1'),
    'text as iscrowd': ([each('annotations', 0, 1, iscrowd='0')], 'iscrowd of 2'),
    'id 0': ([each('annotations', id=0)], '10 annotations numbered anew from 1'),
    'no id': ([each('annotations', id=...)], 'numbered'),
    'id twice': ([each('annotations', id=1)], 'numbered'),
    'id of text': ([each('annotations', id='x')], 'numbered'),
    'no area': ([each('annotations', area=...)], AREA),
    'area 0': ([each('annotations', area=0)], AREA),
    'negative area': ([each('annotations', area=-1.5)], AREA),
    'infinity as area': ([each('annotations', area=float('inf'))], AREA),
    'area of RLE': ([each('annotations', area=None, segmentation=RLE)], AREA),
    'number as name': ([each('categories', name=1)], 'Names of 1 categories'),
    'name twice': ([same_name], "'1' of id 10 merged with that of id 1"),
    # Roboflow writes the name of the whole set, which may be that of its class.
    'name of an unused category': ([unused_category], "'0' of id 0 merged with that"),
    'category listed again': (
        [lambda content: content['categories'].append(content['categories'][0])],
        "'0' of id 0 merged with that of id 0",
    ),
    'another order': ([reverse], 'ordered'),
    'flat mask': (
        [each('annotations', segmentation=[4, 4, 24, 4, 24, 24])],
        'Masks of 1 annotations put into a list',
    ),
    'bad polygons': (
        [each('annotations', segmentation=[[4, 4], [4, 4, 24, 4, 24, 24], [None] * 6])],
        'Masks of 1 annotations rid of unusable polygons',
    ),
    'two corners as mask': (
        [many(each('annotations', segmentation=[[4, 4, 24, 24]]))],
        '1 annotations without a usable mask left out',
    ),
}  # fmt: skip
WITHOUT_MASKS = {
    'area of a box': (
        [each('annotations', area=..., segmentation=...)],
        'area of 1 annotations computed from their box',
    ),
}


@pytest.mark.parametrize('case', {**REPAIRS, **WITHOUT_MASKS})
def test_repairs(coco, case):
    changes, line = {**REPAIRS, **WITHOUT_MASKS}[case]
    edit(*changes)(coco)
    cfg = config(DET, coco)
    if case in WITHOUT_MASKS:
        cfg.val_dataloader.dataset.pipeline = []
        cfg.val_evaluator.metric = 'bbox'
    assert check_data(cfg, 'val', look='names').findings
    (source,) = _sources(cfg, 'val', 'names', None)
    assert is_coco(source)
    content = read_coco(source)
    assert_says(fix_coco(content, source), line)
    (coco / 'coco.json').write_text(json.dumps(content))
    fatal = [x for x in check_data(cfg, 'val', look='names').findings if x.fatal]
    assert fatal == []
    assert fix_coco(read_coco(source), source) == []
    if len(content['annotations']) < 100:  # of each image, which pycocotools reads
        assert score(content) == 1
        assert case in WITHOUT_MASKS or score(content, 'segm') == 1


def test_repaired_values(tmp_path):
    (source,) = _sources(config(DET, tmp_path), 'train', 'names', None)

    def repaired(*changes):
        content = spoilt(*changes)
        fix_coco(content, source)
        return content

    for same in (reverse, each('annotations', 0, 1, iscrowd=...)):
        assert repaired(same) == coco_content()
    # The mask has 190 pixels, and the box 400.
    content = repaired(each('annotations', area=...))
    assert content == spoilt(each('annotations', area=190))
    # Objects without masks are not made background, but for a few.
    for boxes in (range(10), [1]):
        content = repaired(each('annotations', *boxes, segmentation=...))
        assert len(content['annotations']) == 10
    # Masks that nothing reads stay as they are.
    source.config['pipeline'] = []
    for mask_ in ([4, 4, 24, 4, 24, 24], [[4, 4, 24, 24]]):
        content = spoilt(each('annotations', segmentation=mask_))
        assert fix_coco(content, source) == []
        assert content == spoilt(each('annotations', segmentation=mask_))
    # All objects of a category that is listed twice are kept.
    content = repaired(same_name)
    assert [x['category_id'] for x in content['annotations']] == [*range(10), 1]
    assert content['categories'] == coco_content()['categories']
    for merged in (unused_category, each('categories', 0, name=0)):
        assert 'renamed' not in str(repaired(merged)['categories'])
    # The size of an unknown image is unknown.
    content = repaired(each('annotations', area=..., image_id=7))
    assert content == spoilt(each('annotations', area=400, image_id=7))
    # It is not known what is meant.
    content = repaired(each('annotations', iscrowd='no'))
    assert content == spoilt(each('annotations', iscrowd='no'))
    # Nothing is done to a file that lacks more.
    without_box = each('annotations', bbox=..., iscrowd=...)
    assert repaired(without_box) == spoilt(without_box)


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
