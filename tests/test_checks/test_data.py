# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Data that do not fit a config, of any format."""

import json
import shutil

import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from PIL import Image
from pycocotools.coco import COCO

from mlla_mm.checks.config import check_config
from mlla_mm.checks.data import (
    check_data,
    check_splits,
    describe,
    require_data,
    write_fixed,
)
from mlla_mm.checks.source import progress

from .. import bad_data
from ..bad_data import (
    CLS,
    DET,
    IMAGE,
    MAKE,
    SEG,
    assert_says,
    coco_content,
    config,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)
from mmdet.datasets import CocoDataset  # noqa: E402


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
@pytest.mark.parametrize(
    'spoil', ['postscript', 'pipe', 'endless', 'link_to_nothing', 'bomb']
)
@pytest.mark.usefixtures('no_waiting')
def test_files_of_strangers(tmp_path, monkeypatch, scope, spoil, tmp_path_factory):
    marker = bad_data.fake_ghostscript(monkeypatch, tmp_path_factory.mktemp('bin'))
    name = IMAGE[scope]
    MAKE[scope](tmp_path)
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
    (warning,) = check_splits(cfg).findings
    assert not warning.fatal
    assert_says(warning.problem, 'were not checked: train_dataloader.dataset')
    remote = dict(type='CustomDataset', data_root='s3://bucket', data_prefix='train')
    panoptic = dict(type='mmdet.CocoPanopticDataset', ann_file='nowhere.json')
    for dataset in (remote, panoptic):
        cfg.train_dataloader.dataset = dataset
        assert check_data(cfg, 'train') is None
    cfg.train_dataloader.dataset = other
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


BROKEN = 'train_dataloader.dataset cannot be built'


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(img_prefix='images'), ['.img_prefix: CocoDataset', 'data_prefix meant']),
        (dict(data_prefix='images'), [' cannot be built', 'AttributeError']),
        (dict(ann_file=['coco.json']), [' cannot be built', 'TypeError']),
        (dict(data_prefix=dict(img=3)), [' cannot', 'prefix should be a string']),
    ],
)
def test_wrong_arguments(coco, changes, words):
    """The first two are those of mmdet before version 3."""
    cfg = config(DET, coco)
    dataset = dict(cfg.train_dataloader.dataset, **changes)
    cfg = cfg.to_dict()
    cfg['train_dataloader']['dataset'] = dataset
    check_config(Config(cfg))
    with pytest.raises(ValueError) as caught:
        require_data(Config(cfg), 'train')
    first, *others = words
    assert_says(caught.value, f'train_dataloader.dataset{first}', *others)


def test_no_annotations_and_no_folder(coco):
    cfg = config(DET, coco)
    cfg.train_dataloader.dataset.ann_file = None
    with pytest.raises(ValueError, match='Annotation file not found'):
        require_data(cfg, 'train')
    cfg = config(DET, coco)
    cfg.train_dataloader.dataset.data_prefix = {}
    with pytest.raises(ValueError, match='train_dataloader.dataset has no data_prefix'):
        require_data(cfg, 'train')


@pytest.mark.parametrize('task', ['masks', 'folders'])
@pytest.mark.parametrize('path', [None, ['a.txt']])
def test_lists_of_images_that_are_no_path(request, task, path):
    scope = dict(masks=SEG, folders=CLS)[task]
    cfg = config(scope, request.getfixturevalue(task))
    cfg.train_dataloader.dataset.ann_file = path
    with pytest.raises(ValueError, match='train_dataloader.dataset.*ann_file'):
        require_data(cfg, 'train')


@pytest.mark.parametrize(
    'dataset, words',
    [
        (None, 'train_dataloader has no dataset. See docs'),
        ({}, 'train_dataloader has no dataset. See docs'),
        (dict(data_root='data'), 'train_dataloader.dataset has no type. See docs'),
    ],
)
def test_no_data_set(coco, dataset, words):
    cfg = config(DET, coco)
    cfg.train_dataloader.dataset = dataset
    with pytest.raises(ValueError, match=words):
        require_data(cfg, 'train')
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    assert require_data(cfg, 'val') is None


@pytest.mark.parametrize(
    'changes',
    [
        dict(data_root='s3://bucket/data'),
        dict(ann_file='s3://bucket/coco.json'),
        dict(data_prefix=dict(img='http://host/images/')),
        dict(backend_args=dict(backend='petrel')),
    ],
)
def test_files_that_are_not_local(coco, changes):
    cfg = config(DET, coco)
    cfg.train_dataloader.dataset.update(changes)
    assert require_data(cfg, 'train') is None
    cfg.val_evaluator.ann_file = 's3://bucket/coco.json'
    assert not [x for x in require_data(cfg, 'val').findings if x.fatal]


def test_names_of_folders_in_the_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    assert list(progress([1], 'a[/b]\x1b[31m', 1)) == [1]
    assert '\x1b[31m' not in capsys.readouterr().out


# How often each class occurs.


@DATASETS.register_module()
class OwnFormat(CocoDataset):
    """It reads other files than the class from which it inherits."""

    def load_data_list(self):
        instances = [dict(bbox_label=i, ignore_flag=0) for i in range(10)]
        return [dict(img_path='0.jpg', instances=instances)]


def test_a_subclass_that_reads_other_files():
    cfg = config(DET, 'nowhere')
    cfg.train_dataloader.dataset.update(type='OwnFormat', filter_cfg=None)
    report = check_data(cfg, 'train')
    assert report.findings == [] and report.counts['train'].numbers == [1] * 10


@DATASETS.register_module()
class OwnBoxes(BaseDataset):
    """A data set of somebody's own format. Its annotations are lists of labels."""

    METAINFO = dict(classes=tuple('abcdefghij'))

    def load_data_list(self):
        return [
            dict(
                img_path=f'{i}.jpg',
                instances=[dict(bbox_label=x, ignore_flag=x % 2) for x in labels],
            )
            for i, labels in enumerate(json.loads(self.ann_file))
        ]


@DATASETS.register_module()
class OwnLabels(BaseDataset):
    METAINFO = dict(classes=tuple('abcdefghij'))

    def load_data_list(self):
        labels = json.loads(self.ann_file)
        return [dict(img_path=f'{i}.jpg', gt_label=x) for i, x in enumerate(labels)]


def own(scope, labels):
    cfg = config(scope)
    kind = 'OwnBoxes' if scope == DET else 'OwnLabels'
    # A name of a file, which is not joined to a folder.
    cfg.train_dataloader.dataset = dict(type=kind, ann_file=json.dumps(labels))
    return cfg


def test_data_sets_of_an_unknown_format_are_counted():
    report = check_data(own(DET, [[0, 2, 2], [2, 3], []]), 'train')
    counts = report.counts['train']
    assert (counts.images, counts.unit, counts.classes[:2]) == (
        3,
        'objects',
        ('a', 'b'),
    )
    # Crowds and the like (ignore_flag) are not learned.
    assert counts.numbers == [1, 0, 3] + [0] * 7
    assert counts.images_with == [1, 0, 2] + [0] * 7
    (finding,) = report.findings
    assert finding.fatal
    assert_says(finding.problem, '8 classes of train_dataloader', ': b, d, e and 5')
    assert_says(finding.fix, 'allow_empty_classes = True')


@pytest.mark.parametrize('scope', [DET, CLS])
def test_labels_outside_the_classes(scope):
    labels = [*range(10), 10, -2]
    cfg = own(scope, [labels] if scope == DET else labels)
    with pytest.raises(ValueError) as caught:
        require_data(cfg, 'train')
    assert_says(
        caught.value,
        '2 labels of train_dataloader.dataset are not from 0 to 9: ',
        '10',
        '-2',
        'metainfo.classes',
    )


def test_classes_without_images(capsys):
    # The first image has two classes.
    cfg = own(CLS, [[0, 1], *range(2, 9)])
    with pytest.raises(ValueError, match='1 classes of train_dataloader.*: j'):
        require_data(cfg, 'train')
    cfg.allow_empty_classes = True
    lines = list(describe(require_data(cfg, 'train')))
    assert lines[0].startswith('Warning: 1 classes of train_dataloader')
    assert lines[1:] == ['Data of train: 8 images, 10 classes.']
    cfg = own(CLS, list(range(9)))
    cfg.val_dataloader.dataset = cfg.train_dataloader.dataset
    (warning,) = require_data(cfg, 'val').findings
    assert_says(warning.problem, '1 classes of val_dataloader.dataset', ': j')


def test_data_without_an_image():
    with pytest.raises(ValueError, match='train_dataloader.dataset has no image'):
        require_data(own(DET, []), 'train')
    cfg = own(DET, [[], [1]])  # what is ignored is not measured
    cfg.val_dataloader.dataset = cfg.train_dataloader.dataset
    with pytest.raises(ValueError, match='val_dataloader.dataset has no objects of'):
        require_data(cfg, 'val')


def test_classes_are_counted_over_all_data_sets():
    """Each of them may have some classes alone."""
    cfg = own(CLS, list(range(6)))
    other = own(CLS, list(range(4, 10))).train_dataloader.dataset
    both = [dict(type='RepeatDataset', times=2, dataset=other)]
    both.append(cfg.train_dataloader.dataset)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=both)
    report = require_data(cfg, 'train')
    assert report.counts['train'].numbers == [1, 1, 1, 1, 2, 2, 1, 1, 1, 1]
    assert report.counts['train'].images == 12
    cfg.train_dataloader.dataset.datasets[0].dataset.ann_file = '[4, 5]'
    with pytest.raises(ValueError, match='4 classes of train_dataloader.*: g, h, i'):
        require_data(cfg, 'train')


def test_the_data_set_that_is_wrong_is_named(folders):
    cfg = config(CLS, folders)
    good = cfg.train_dataloader.dataset
    bad = dict(good, data_root='nowhere')
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[good, bad])
    with pytest.raises(ValueError, match=r'train_dataloader.dataset.datasets.1'):
        require_data(cfg, 'train')


# Annotations of metrics.


def test_metric_of_other_annotations(coco):
    cfg = config(DET, coco)
    cfg.val_evaluator.ann_file = str(coco / 'nowhere.json')
    with pytest.raises(ValueError, match=r'nowhere.json.*ann_file of val_evaluator'):
        require_data(cfg, 'val')

    content = coco_content()
    for image in content['images']:
        image['id'] += 1
    for annotation in content['annotations']:
        annotation['image_id'] += 1
    (coco / 'other.json').write_text(json.dumps(content))
    cfg.val_evaluator.ann_file = str(coco / 'other.json')
    with pytest.raises(ValueError) as caught:
        require_data(cfg, 'val')
    assert_says(caught.value, 'other.json', 'ids: 0.', 'Name the same file')


def test_metric_of_more_images_than_are_used(coco):
    """It counts the objects of the others as missed."""
    cfg = config(DET, coco)
    content = coco_content()
    content['images'].append(dict(content['images'][0], id=7, file_name='7.jpg'))
    (coco / 'train.json').write_text(json.dumps(content))
    cfg.val_evaluator.ann_file = str(coco / 'train.json')
    # This image has no objects.
    assert require_data(cfg, 'val').findings == []
    content['annotations'].append(dict(content['annotations'][0], id=11, image_id=7))
    (coco / 'train.json').write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        require_data(cfg, 'val')
    assert_says(
        caught.value, '1 images with objects in ', 'train.json, which val_evaluator',
        'not used by val_dataloader: ids: 7.', 'Name the same file',
    )  # fmt: skip


def test_images_that_are_measured_but_left_out(coco):
    cfg = config(DET, coco)
    cfg.val_dataloader.dataset.indices = 2
    warnings = [finding.problem for finding in require_data(cfg, 'val').findings]
    assert_says(warnings, '1 images with objects', 'coco.json', 'ids: 2')
    del cfg.val_dataloader.dataset.indices
    cfg.val_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=50)
    require_data(cfg, 'val')
    del cfg.val_dataloader.dataset.test_mode
    content = coco_content()
    content['images'][0].update(width=60, height=60)
    (coco / 'coco.json').write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match='2 images with objects.* write test_mode=True'
    ):
        require_data(cfg, 'val')
    del cfg.val_evaluator.ann_file
    require_data(cfg, 'val')


def test_metric_of_images_of_another_format(coco):
    cfg = config(DET, coco)
    content, both = coco_content(), coco_content()
    for i in range(3):
        content['images'][i]['id'] += 3
    for annotation in content['annotations']:
        annotation['image_id'] += 3
    (coco / 'more.json').write_text(json.dumps(content))
    both['images'] += content['images']
    both['annotations'] += [dict(x, id=x['id'] + 10) for x in content['annotations']]
    (coco / 'both.json').write_text(json.dumps(both))
    data = cfg.val_dataloader.dataset
    # It has a reader of its own.
    more = dict(data, type='Objects365V1Dataset', ann_file='more.json')
    more['metainfo'] = dict(classes=tuple(map(str, range(10))))
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[data, more])
    cfg.val_evaluator.ann_file = str(coco / 'both.json')
    report = require_data(cfg, 'val')
    assert [x.problem for x in report.findings if 'not used' in x.problem] == []
    assert report.counts['val'].images == 6


def test_images_of_two_data_sets_with_one_id(coco):
    """A metric takes them for one image. In training they are not mixed up."""
    cfg = config(DET, coco)
    for split in ('train', 'val'):
        data = cfg[f'{split}_dataloader'].dataset
        both = dict(type='ConcatDataset', datasets=[data, data])
        cfg[f'{split}_dataloader'].dataset = both
    del cfg.val_evaluator.ann_file
    assert not [x for x in check_data(cfg, 'train').findings if x.fatal]
    with pytest.raises(ValueError, match='3 ids of images occur in more than one'):
        require_data(cfg, 'val')
    metrics = [cfg.val_evaluator, cfg.val_evaluator]
    cfg.val_evaluator = dict(type='MultiDatasetsEvaluator', metrics=metrics)
    require_data(cfg, 'val')


# Repaired annotations.


def spoiled(root):
    """Annotations as some exports write them: no iscrowd, and ids from 0."""
    content = coco_content()
    for i, annotation in enumerate(content['annotations']):
        del annotation['iscrowd']
        annotation['id'] = i
    (root / 'coco.json').write_text(json.dumps(content))
    return content


def test_write_fixed(coco, tmp_path_factory):
    out = tmp_path_factory.mktemp('fixed')
    cfg = config(DET, coco)
    content = spoiled(coco)
    assert [x for x in check_splits(cfg).findings if x.fatal]
    lines = '\n'.join(write_fixed(cfg, out))
    # The original is as it was, and the config names the new file everywhere.
    assert json.loads((coco / 'coco.json').read_text()) == content
    fixed = out / 'coco.json'
    for key in ('train_dataloader.dataset', 'val_dataloader.dataset', 'val_evaluator'):
        assert f'{key}.ann_file: ' in lines
    assert lines.count(f'-> {str(fixed)!r}') >= 3
    assert not [x for x in check_splits(cfg).findings if x.fatal]
    assert len(COCO(fixed).anns) == 10 and 0 not in COCO(fixed).anns

    again = config(DET, coco)
    with pytest.raises(ValueError, match='already there. Choose another folder'):
        write_fixed(again, out)
    with pytest.raises(ValueError, match='already there. Choose another folder'):
        write_fixed(again, coco)


def test_write_fixed_keeps_the_names_of_folders_that_differ(coco, tmp_path_factory):
    """Some exports call the file the same in each split's folder."""
    out = tmp_path_factory.mktemp('fixed')
    spoiled(coco)
    cfg = config(DET, coco)
    for split in ('train', 'val'):
        (coco / split).mkdir()
        shutil.copy(coco / 'coco.json', coco / split)
        cfg[f'{split}_dataloader'].dataset.ann_file = f'{split}/coco.json'
    write_fixed(cfg, out)
    assert sorted(x.relative_to(out).as_posix() for x in out.rglob('*.json')) == [
        'train/coco.json',
        'val/coco.json',
    ]


def test_write_fixed_of_links(coco, tmp_path_factory):
    """Tools that keep data in a store link to files with checksums as names."""
    store = tmp_path_factory.mktemp('store') / 'd41d8cd9'
    content = spoiled(coco)
    (coco / 'coco.json').rename(store)
    (coco / 'coco.json').symlink_to(store)
    (coco / 'file').touch()
    with pytest.raises(ValueError, match='file/coco.json cannot be written.*Choose'):
        write_fixed(config(DET, coco), coco / 'file')
    write_fixed(config(DET, coco), coco / 'fixed')
    assert len(COCO(coco / 'fixed/coco.json').anns) == 10
    assert json.loads(store.read_text()) == content


def test_nothing_to_write(coco, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp('fixed')
    assert write_fixed(config(DET, coco), out) == [
        f'{coco}/coco.json: nothing to repair'
    ]
    with pytest.raises(ValueError, match='no annotations in the format of COCO'):
        write_fixed(config(CLS, folders), out)
    (coco / 'coco.json').write_text('[')
    with pytest.raises(ValueError, match='coco.json is not JSON'):
        write_fixed(config(DET, coco), out)
    cfg = config(DET, coco)
    cfg.train_dataloader.dataset.ann_file = None
    with pytest.raises(ValueError, match='Annotation file not found'):
        write_fixed(cfg, out)
    assert list(out.iterdir()) == []
