# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Wrappers of data sets: what checks, tools and runs do with the data sets in them."""

import copy
import json

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope

from benchmarks.peak_memory import largest_size
from mlla_mm.checks.config import check_config
from mlla_mm.datasets.corrupt_images import CheckedDataset, CorruptImageError
from mlla_mm.engine.options import dump_predictions, enable_tta
from mlla_mm.engine.parts import data_pipelines, leaf_datasets
from mlla_mm.reproducible.seeding import SAMPLE, Draw, SeededDataset

from ..bad_data import (
    CLS,
    DET,
    IMAGE,
    MAKE,
    SEG,
    assert_says,
    coco_content,
    config,
    truncate,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


def concat(*datasets, **more):
    return dict(type='ConcatDataset', datasets=list(datasets), **more)


def repeat(dataset, times=2):
    return dict(type='RepeatDataset', times=times, dataset=dataset)


def balanced(dataset):
    return dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=dataset)


def folds(dataset):
    return dict(type='KFoldDataset', num_splits=2, test_mode=True, dataset=dataset)


def mixed(dataset, *steps):
    """The images of a data set, each mixed with others."""
    steps = [dict(x, with_mask=False) if 'with_mask' in x else x for x in steps]
    return dict(type='MultiImageMixDataset', dataset=dataset, pipeline=steps)


def leaf(scope, root, split='train', **more):
    dataset = config(scope, root)[f'{split}_dataloader'].dataset.to_dict()
    return dict(dataset, **more)


def only_load(dataset):
    """A data set that loads its images, and their boxes or label maps."""
    return dict(dataset, pipeline=dataset['pipeline'][:2])


# Walks over configs.


def test_leaves():
    a, b, c = (dict(type=name) for name in 'abc')
    loader = ConfigDict(dataset=repeat(concat(balanced(a), concat(b, c))))
    expected = {
        'dataset.dataset.datasets.0.dataset': a,
        'dataset.dataset.datasets.1.datasets.0': b,
        'dataset.dataset.datasets.1.datasets.1': c,
    }
    assert dict(leaf_datasets(loader)) == expected
    assert leaf_datasets(dict(dataset=a)) == [('dataset', a)]
    # They are no wrappers.
    for odd in (dict(dataset='train'), dict(datasets=['coco', 'lvis'])):
        assert leaf_datasets(dict(dataset=odd)) == [('dataset', odd)]
    for nothing in (None, {}, dict(batch_size=2), dict(dataset=object())):
        assert leaf_datasets(nothing) == []


def test_pipelines_go_from_the_inside_out():
    inner, outer = [dict(type='Load')], [dict(type='Mosaic'), dict(type='Pack')]
    loader = dict(dataset=repeat(mixed(dict(type='a', pipeline=inner), *outer)))
    ((key, steps),) = data_pipelines(loader)
    assert key == 'dataset.dataset.dataset' and steps == [*inner, *outer]


def test_tta_reaches_every_data_set():
    cfg = config(SEG, 'root')
    one = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = repeat(concat(one, concat(copy.deepcopy(one))))
    enable_tta(cfg)
    found = leaf_datasets(cfg.test_dataloader)
    assert len(found) == 2
    assert all(x['pipeline'] == cfg.tta_pipeline for _, x in found)
    cfg = config(SEG)
    cfg.pop('test_dataloader')
    with pytest.raises(ValueError, match='--tta needs test_dataloader'):
        enable_tta(cfg)


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
def test_largest_size(scope):
    """Of all data sets; and the last resize of a wrapper counts."""
    cfg = config(scope, 'root')
    cfg.model.data_preprocessor.pop('size', None)
    small, large = ConfigDict(cfg.train_dataloader.dataset), leaf(scope, 'root')
    small.pipeline = [dict(type='Resize', scale=(32, 16))]
    large['pipeline'] = [dict(type='Resize', scale=(100, 200))]
    cfg.train_dataloader.dataset = concat(small, repeat(large))
    assert largest_size(cfg) == (200, 100)
    after = dict(type='Resize', scale=(50, 60))
    cfg.train_dataloader.dataset = mixed(concat(small, large), after)
    assert largest_size(cfg) == (60, 50)
    cfg.train_dataloader.dataset = mixed(dict(small, pipeline=[]))
    with pytest.raises(ValueError, match='--size'):
        largest_size(cfg)


# Classes.


NAMES = tuple('0123456789')
OTHER = (*NAMES[:-1], 'nine')
TURNED = NAMES[::-1]


def named(*classes, **more):
    return dict(type='CocoDataset', metainfo=dict(classes=classes), **more)


# Data sets for training and validation, and what the error says.
CLASS_ERRORS = {
    'another name': (
        concat(named(*NAMES), named(*OTHER)), named(*NAMES),
        ['train_dataloader.dataset.datasets.0', 'train_dataloader.dataset.datasets.1',
         "label 9 is '9'", "'nine'"],
    ),
    'another order, deeper': (
        concat(named(*NAMES), repeat(concat(named(*NAMES), named(*TURNED)))),
        named(*NAMES),
        ['dataset.datasets.0 and', 'dataset.datasets.1.dataset.datasets.1',
         "label 0 is '0'", "'9'"],
    ),
    'fewer': (
        concat(named(*NAMES), named(*NAMES[:8])), named(*NAMES),
        ["label 8 is '8'", 'missing'],
    ),
    'names of the type': (
        concat(named(*NAMES), dict(type='CocoDataset')), named(*NAMES),
        ["label 0 is '0'", "'person'"],
    ),
    # MMEngine itself does not look at what it is told to ignore.
    'ignored': (
        concat(named(*NAMES), named(*OTHER), ignore_keys=['classes']), named(*NAMES),
        ["'nine'"],
    ),
    'training and validation': (
        named(*NAMES), repeat(named(*TURNED)),
        ['train_dataloader.dataset and val_dataloader.dataset.dataset',
         "label 0 is '0'", "'9'", 'metainfo.classes'],
    ),
    'number below a wrapper': (
        repeat(concat(named('a', 'b'))), named(*NAMES),
        ['bbox_head.num_classes is 10', 'train_dataloader has 2 classes (a, b)'],
    ),
    'fewer in validation': (
        named(*NAMES), named(*NAMES[:8]),
        ['bbox_head.num_classes is 10', 'val_dataloader has 8 classes (0, 1, 2, ...)'],
    ),
    'no comma': (
        dict(type='CocoDataset', metainfo=dict(classes='red')), named(*NAMES),
        ['train_dataloader.dataset.metainfo.classes', 'comma', "('red',)"],
    ),
    'twice': (
        named(*NAMES[:9], '3'), named(*NAMES),
        ["train_dataloader.dataset has the class '3' twice"],
    ),
    'a set': (
        named(*NAMES), dict(type='CocoDataset', metainfo=dict(classes={*NAMES})),
        ['val_dataloader.dataset.metainfo.classes is a set', 'tuple'],
    ),
    'capitals': (
        named(*NAMES), dict(type='CocoDataset', metainfo=dict(CLASSES=NAMES)),
        ['val_dataloader.dataset.metainfo has CLASSES', 'classes instead'],
    ),
}  # fmt: skip


def with_data(scope, train, val):
    cfg = config(scope)
    for split, dataset in dict(train=train, val=val, test=val).items():
        cfg[f'{split}_dataloader'].dataset = dataset
    return cfg


@pytest.mark.parametrize('case', CLASS_ERRORS)
def test_classes_that_differ(case):
    train, val, words = CLASS_ERRORS[case]
    with pytest.raises(ValueError) as caught:
        check_config(with_data(DET, train, val))
    assert_says(caught.value, *words)


def test_classes_that_agree(tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join(NAMES))
    in_file = dict(type='CocoDataset', metainfo=dict(classes=str(names)))
    own = dict(type='CustomDataset', data_root='of a type whose classes are unknown')
    as_list = dict(type='CocoDataset', metainfo=dict(classes=[*NAMES]))
    remote = dict(type='CocoDataset', metainfo=dict(classes='s3://bucket/names.txt'))
    both = concat(in_file, as_list, repeat(named(*NAMES)))
    for dataset in (in_file, as_list, remote, both):
        check_config(with_data(DET, dataset, named(*NAMES)))
    cfg = with_data(DET, named(*NAMES), named(*NAMES))
    cfg.test_dataloader.dataset = named(*OTHER)  # they are not those of training
    check_config(cfg)
    # mmpretrain shows names, but does not look for them: a crane is a bird, or lifts.
    twice = dict(own, metainfo=dict(classes=(*NAMES[:9], '3')))
    check_config(with_data(CLS, twice, twice))
    # It can be evaluated on some of its classes, and takes classes without metainfo.
    few = dict(own, classes=['a', 'b'])
    check_config(with_data(CLS, dict(own, classes=NAMES), few))
    with pytest.raises(ValueError, match='datasets.1 have other classes'):
        check_config(with_data(CLS, concat(dict(own, classes=NAMES), few), own))


def test_mmdet_learns_classes_that_differ_in_silence(coco):
    """Its wrapper takes data sets of other classes, and so learns other labels."""
    one, other = (
        leaf(DET, coco, metainfo=dict(classes=names)) for names in (NAMES, NAMES[1:])
    )
    with DefaultScope.overwrite_default_scope(DET):
        dataset = DATASETS.build(concat(one, other))
    first, second = (
        part.get_data_info(len(part) - 1)['instances'][0]['bbox_label']
        for part in dataset.datasets
    )
    assert (first, second) == (2, 1)  # of the same image
    with pytest.raises(ValueError, match='label 0 is'):
        check_config(with_data(DET, concat(one, other), one))


# Wrappers.


WRAPPER_ERRORS = {
    # As in a config that inherits ours, and forgets _delete_.
    'of the base': (
        DET, dict(repeat(named(*NAMES)), ann_file='a.json'),
        ['train_dataloader.dataset has ann_file', 'RepeatDataset', '_delete_=True'],
    ),
    'metainfo': (
        SEG, repeat(concat(dict(type='BaseSegDataset'), metainfo=dict(classes=NAMES))),
        ['train_dataloader.dataset.dataset has metainfo', 'ConcatDataset'],
    ),
    'masks': (
        DET,
        dict(
            type='MultiImageMixDataset',
            dataset=named(
                *NAMES, pipeline=[dict(type='LoadAnnotations', with_mask=True)]
            ),
            pipeline=[dict(type='Mosaic'), dict(type='PackDetInputs')],
        ),
        ['train_dataloader.dataset.dataset', 'Mosaic', 'CachedMosaic'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', WRAPPER_ERRORS)
def test_wrappers_that_cannot_work(case):
    scope, dataset, words = WRAPPER_ERRORS[case]
    cfg = config(scope)
    cfg.train_dataloader.dataset = dataset
    with pytest.raises(ValueError) as caught:
        check_config(cfg)
    assert_says(caught.value, *words)


@DATASETS.register_module()
class OwnWrapper:
    """A wrapper that gives arguments to another class."""

    def __init__(self, dataset, **kwargs):
        pass


class Mosaic:
    """A transform that mixes masks, too."""


def test_wrappers_that_work():
    load = dict(type='LoadAnnotations', with_mask=True)
    own = [load, dict(type=Mosaic)]
    boxes = [dict(load, with_mask=False), dict(type='Mosaic')]
    cfg = config(DET)
    for dataset in (
        dict(type='OwnWrapper', dataset=named(*NAMES), times=2),
        mixed(named(*NAMES, pipeline=boxes), dict(type='MixUp')),
        named(*NAMES, pipeline=own),
        named(*NAMES, pipeline=[load, dict(type='CachedMosaic')]),
    ):
        cfg.train_dataloader.dataset = dataset
        check_config(cfg)


def test_mosaics_of_mmdet_leave_masks_alone(coco):
    data = only_load(leaf(DET, coco))
    mosaic = dict(type='Mosaic', img_scale=(64, 64))
    with DefaultScope.overwrite_default_scope(DET):
        results = DATASETS.build(mixed(data, mosaic))[0]
        of_one_image = sum(x['image_id'] == 0 for x in coco_content()['annotations'])
        assert len(results['gt_bboxes']) > len(results['gt_masks']) == of_one_image
        mosaic['type'] = 'CachedMosaic'
        dataset = DATASETS.build(dict(data, pipeline=[*data['pipeline'], mosaic]))
        for i in (0, 1, 2, 0, 1):
            results = dataset[i]
        assert len(results['gt_bboxes']) == len(results['gt_masks']) > 1


def test_a_metric_of_one_data_set(tmp_path):
    roots = [tmp_path / name for name in 'ab']
    cfg = config(DET)
    one, other = (leaf(DET, root, 'val') for root in roots)
    cfg.val_dataloader.dataset = concat(one, other)
    cfg.val_evaluator.ann_file = f'{roots[0]}/coco.json'
    with pytest.raises(ValueError) as caught:
        check_config(cfg)
    assert_says(
        caught.value, 'val_evaluator.ann_file', 'val_dataloader.dataset.datasets.1',
        'MultiDatasetsEvaluator',
    )  # fmt: skip
    cfg.val_dataloader.dataset = concat(one, dict(one, indices=2))
    check_config(cfg)
    # Of both, with other numbers for their images.
    cfg.val_dataloader.dataset = concat(one, other)
    cfg.val_evaluator.ann_file = f'{tmp_path}/both.json'
    check_config(cfg)
    cfg.val_evaluator = dict(
        type='MultiDatasetsEvaluator',
        metrics=[dict(cfg.val_evaluator, ann_file=f'{x}/coco.json') for x in roots],
        dataset_prefixes=['a', 'b'],
    )
    check_config(cfg)
    cfg.test_evaluator = cfg.val_evaluator
    with pytest.raises(ValueError, match='--out .*MultiDatasetsEvaluator'):
        dump_predictions(cfg, 'all.pkl')


# Data sets that are built.


def build(scope, dataset, kind=CheckedDataset, **options):
    with DefaultScope.overwrite_default_scope(scope):
        return kind(copy.deepcopy(dataset), **options)


def test_metainfo_of_different_colours(coco):
    """mmdet makes a list of both, which neither its metric nor visualizers take."""
    colours = [[(i, i, k) for i in range(10)] for k in (1, 2)]
    parts = [leaf(DET, coco, metainfo=dict(classes=NAMES, palette=x)) for x in colours]
    dataset = build(DET, concat(*parts))
    assert isinstance(dataset.dataset.metainfo, list)
    assert dataset.metainfo['palette'] == colours[0]
    assert dataset.metainfo['cumulative_sizes'] == [3, 6]  # for mmdet's evaluator
    # So are those of nested ones.
    dataset = build(DET, concat(concat(*parts[:1]), parts[0]))
    assert dataset.metainfo['classes'] == NAMES


def wrapped(scope):
    """Each wrapper, of two data sets if it takes them; and the index of an image."""
    wrappers = {
        'concat': lambda a, b: (concat(a, b), len_of(scope) + 1),
        'repeat': lambda a, b: (repeat(b), len_of(scope) + 1),
        'nested': lambda a, b: (repeat(concat(repeat(a), b)), 2 * len_of(scope) + 1),
    }
    if scope != SEG:  # whose data sets do not tell the classes of an image
        wrappers['balanced'] = lambda a, b: (balanced(b), None)
    if scope == CLS:
        wrappers['folds'] = lambda a, b: (folds(b), 1)
    return wrappers


def len_of(scope):
    return 10 if scope == CLS else 3


@pytest.fixture
def two(tmp_path):
    """Data of a task, twice."""

    def make(scope):
        roots = [tmp_path / 'a', tmp_path / 'b']
        for root in roots:
            MAKE[scope](root)
        return roots

    return make


@pytest.mark.parametrize(
    'scope, kind', [(scope, kind) for scope in MAKE for kind in wrapped(scope)]
)
@pytest.mark.filterwarnings('ignore:Skipped')
def test_corrupt_images_below_wrappers(two, scope, kind):
    roots = two(scope)
    config_, index = wrapped(scope)[kind](*(leaf(scope, x) for x in roots))
    truncate(roots[1] / IMAGE[scope])
    dataset = build(scope, config_)
    if index is None:
        files = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
        index = files.index(str(roots[1] / IMAGE[scope]))
    with pytest.raises(CorruptImageError) as caught:
        dataset[index]
    assert_says(caught.value, roots[1] / IMAGE[scope], 'is truncated', 'Replace it')
    assert dataset[0] is not None
    dataset = build(scope, config_, SeededDataset, skip_corrupt_images=True)
    assert dataset[Draw(index, (SAMPLE, 0, 0, 0))] is not None
    assert dataset.skipped.value >= 1


MIXES = {
    DET: dict(type='Mosaic', img_scale=(64, 64)),
    SEG: dict(type='RandomMosaic', prob=1.0, img_scale=(64, 64)),
}


def mosaic(scope, roots):
    """Images of four, by a wrapper of wrappers."""
    parts = [only_load(leaf(scope, root)) for root in roots]
    for part in parts:
        part['pipeline'] = [
            dict(x, with_mask=False) if 'with_mask' in x else x
            for x in part['pipeline']
        ]
    last = leaf(scope, roots[0])['pipeline'][-1]
    return mixed(repeat(concat(*parts)), MIXES[scope], last)


@pytest.mark.parametrize('scope', MIXES)
@pytest.mark.filterwarnings('ignore:Skipped')
def test_corrupt_images_of_a_mix(two, scope):
    """The file is another one than that of the index."""
    roots = two(scope)
    truncate(roots[1] / 'images/1.jpg')
    draws = [Draw(0, (SAMPLE, 0, 0, i)) for i in range(20)]
    dataset = build(scope, mosaic(scope, roots), SeededDataset)
    with pytest.raises(CorruptImageError) as caught:
        for draw in draws:
            dataset[draw]
    way_out = 'train_cfg.skip_corrupt_images=True'
    assert_says(caught.value, roots[1] / 'images/1.jpg', 'is truncated', way_out)
    dataset = build(
        scope, mosaic(scope, roots), SeededDataset, skip_corrupt_images=True
    )
    samples = [dataset[draw] for draw in draws]
    assert dataset.skipped.value > 0
    assert all(x['inputs'].shape[0] == 3 for x in samples)


@pytest.mark.parametrize('scope', MIXES)
def test_a_decoder_that_fills_up_in_a_mix(two, scope, monkeypatch):
    """OpenCV before 4.12 gives grey where a JPEG file is cut off, without an error."""
    roots = two(scope)
    dataset = build(scope, mosaic(scope, roots), SeededDataset)
    whole = dataset.dataset.dataset.dataset[0]  # below the mix
    truncate(roots[1] / 'images/1.jpg')
    whole['img_path'] = str(roots[1] / 'images/1.jpg')
    inner = type(dataset.dataset.dataset.dataset)
    monkeypatch.setattr(inner, '__getitem__', lambda *_: copy.deepcopy(whole))
    with pytest.raises(CorruptImageError, match='b/images/1.jpg is truncated'):
        dataset[Draw(0, (SAMPLE, 0, 0, 0))]


# Tools.


def save_two(scope, two, tmp_path, train, val=None):
    """A config of two data sets, as a file."""
    roots = two(scope)
    cfg = config(scope, roots[0])
    cfg.train_dataloader.dataset = train(*(leaf(scope, x) for x in roots))
    if val is not None:
        parts = [leaf(scope, x, 'val') for x in roots]
        cfg.val_dataloader.dataset = val(*parts)
    cfg.test_dataloader = cfg.val_dataloader
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.dump(tmp_path / 'config.py')
    return tmp_path / 'config.py'


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
def test_predictions_on_images(two, call_tool, nano, tmp_path, scope):
    path = save_two(scope, two, tmp_path, concat, concat)
    _, checkpoint = nano(scope)
    image = tmp_path / 'a' / IMAGE[scope]
    words = 'tools/infer.py', image, path, checkpoint, '--out', tmp_path / 'out'
    call_tool(*words)
    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert results and not [x for x in results if 'error' in x]
    cfg = config(scope)
    cfg.merge_from_dict(dict(test_dataloader=Config.fromfile(path).test_dataloader))
    cfg.test_dataloader.dataset.datasets[1].pipeline[1].scale = (32, 32)
    cfg.dump(path)
    result = call_tool(*words, check=False)
    assert result.returncode == 1
    assert_says(result.stderr, 'dataset.datasets.0', 'dataset.datasets.1', 'pipelines')


def test_updates_of_an_epoch(two, call_tool, tmp_path):
    """All repeats count: 2 x (3 x 10 + 10) images, in batches of eight."""

    def nested(a, b):
        return repeat(concat(repeat(a, 3), b))

    path = save_two(CLS, two, tmp_path, nested)
    cfg = Config.fromfile(path)
    cfg.train_dataloader.batch_size = 8
    cfg.auto_scale_lr.base_batch_size = 16
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.save_best = None
    cfg.dump(path)
    work_dir = tmp_path / 'work'
    call_tool(
        'tools/train.py', path, '--work-dir', work_dir, '--cfg-options',
        'train_cfg.max_epochs=1',
    )  # fmt: skip
    (recipe,) = work_dir.glob('*/recipe.json')
    found = json.loads(recipe.read_text())['updates per epoch']
    assert found == dict(recipe=5, actual=10)
