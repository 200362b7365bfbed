# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Data sets of somebody's own classes: what trains is never refused."""

import numpy as np
import pytest
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.registry import DATASETS
from torch.utils.data import Dataset, IterableDataset

from mlla_mm.checks.config import check_config
from mlla_mm.checks.data import check_data, require_data

from ..bad_data import CLS, DET, SEG, config

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

from mmdet.datasets import CocoDataset  # noqa: E402
from mmpretrain.datasets import CustomDataset  # noqa: E402
from mmseg.datasets import BaseSegDataset  # noqa: E402

CLASSES = tuple('abcdefghij')


class Own(BaseDataset):
    """It loads the samples that it is given."""

    METAINFO = dict(classes=CLASSES)

    def __init__(self, samples=(), **kwargs):
        self.samples = samples
        super().__init__(**kwargs)

    def load_data_list(self):
        return [dict(img_path=f'{i}.jpg', **x) for i, x in enumerate(self.samples)]


class OwnArguments(Own):
    """It has none of MMEngine's arguments."""

    def __init__(self, samples):
        self.samples = samples
        BaseDataset.__init__(self, pipeline=[], lazy_init=True)


class SlowSamples(Own):
    def get_data_info(self, idx):
        raise AssertionError('a check of annotations opened a sample')


class NotMMEngines(Dataset):
    pass


class Stream(IterableDataset):
    pass


class OwnConcat(ConcatDataset):
    pass


class OddOrEven(Dataset):
    """A wrapper that makes two classes of those of the data set in it."""

    def __init__(self, dataset):
        pass


class OwnCoco(CocoDataset):
    """It has none of MMEngine's arguments."""

    def __init__(self, root):
        super().__init__(data_root=root, ann_file='coco.json')


class EagerCoco(CocoDataset):
    def __init__(self, lazy_init=False, **kwargs):
        super().__init__(**kwargs)


class LoadedCoco(CocoDataset):
    def load_data_list(self):
        return super().load_data_list()[:2]


class EagerFolders(CustomDataset):
    def __init__(self, lazy_init=False, **kwargs):
        super().__init__(**kwargs)


class EagerMasks(BaseSegDataset):
    def __init__(self, lazy_init=False, **kwargs):
        super().__init__(**kwargs)


OWN = [
    Own, OwnArguments, SlowSamples, NotMMEngines, Stream, OwnCoco, EagerCoco,
    LoadedCoco, EagerFolders, EagerMasks, OwnConcat, OddOrEven,
]  # fmt: skip


@pytest.fixture(autouse=True)
def registered():
    for kind in OWN:
        DATASETS.register_module(module=kind)
    yield
    for kind in OWN:
        del DATASETS.module_dict[kind.__name__]


def own(scope, kind, **arguments):
    cfg = config(scope)
    cfg.train_dataloader.dataset = dict(type=kind, **arguments)
    return cfg


def ten(value):
    return [value(i) for i in range(10)]


@pytest.mark.parametrize(
    'samples, numbers',
    [
        (ten(lambda i: dict(gt_label=i)), [1] * 10),
        (ten(lambda i: dict(gt_label=np.int64(i))), [1] * 10),
        (ten(lambda i: dict(gt_label=[i, (i + 1) % 10])), [2] * 10),
        # A transform of the pipeline makes a label of them.
        (ten(lambda i: dict(gt_label=f'class {i}')), None),
        (ten(lambda i: dict(gt_label=i + 0.5)), None),
        (ten(lambda i: dict(gt_label=dict(colour=i))), None),
        (ten(lambda i: dict(instances=[dict(phrase='a dog')])), None),
        (ten(lambda i: dict(seg_map_path='0.png')), None),
    ],
)
@pytest.mark.parametrize('kind', ['Own', 'SlowSamples'])
def test_samples(kind, samples, numbers):
    report = require_data(own(CLS, kind, samples=samples), 'train')
    counts = report.counts['train']
    expected = numbers if kind == 'Own' else None
    assert (counts.images, counts.numbers, report.findings) == (10, expected, [])


def test_labels_of_unknown_classes():
    cfg = own(DET, 'Own', samples=[dict(instances=[dict(bbox_label=300)])])
    cfg.train_dataloader.dataset.metainfo = dict(classes=None)
    with pytest.raises(ValueError, match='not from 0 to 9'):
        require_data(cfg, 'train')
    # Such models have places for words, not classes.
    cfg.model.language_model = dict(type='BertModel')
    cfg.val_dataloader.dataset = cfg.train_dataloader.dataset
    assert require_data(cfg, 'train', 'val').findings == []


@pytest.mark.parametrize(
    'kind, arguments',
    [
        ('OwnArguments', dict(samples=[])),
        ('OwnCoco', dict(root='nowhere')),
        ('NotMMEngines', {}),
        ('Stream', {}),
    ],
)
def test_not_checked(kind, arguments):
    cfg = own(DET, kind, **arguments)
    assert require_data(cfg, 'train') is None


@pytest.mark.parametrize('by_class', [False, True])
@pytest.mark.parametrize(
    'scope, kind, images',
    [
        (DET, CocoDataset, 3),
        (DET, EagerCoco, 3),
        (DET, LoadedCoco, 2),
        (SEG, EagerMasks, 3),
        (CLS, EagerFolders, 10),
    ],
)
def test_subclasses(request, scope, kind, images, by_class):
    root = request.getfixturevalue({DET: 'coco', SEG: 'masks', CLS: 'folders'}[scope])
    cfg = config(scope, root)
    cfg.allow_empty_classes = True
    dataset = dict(cfg.train_dataloader.dataset, type=kind.__name__)
    dataset.pop('split', None)  # an argument of ImageNet's class alone
    dataset.setdefault('data_prefix', 'train')
    if by_class:
        cfg = cfg.to_dict()
        dataset['type'] = kind
        cfg['train_dataloader']['dataset'] = dataset
    else:
        cfg.train_dataloader.dataset = dataset
    assert check_data(cfg, 'train').counts['train'].images == images


def test_wrappers(coco):
    cfg = config(DET, coco)
    leaf = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='OddOrEven', dataset=leaf)
    cfg.val_dataloader = cfg.test_dataloader = None
    for head in ('bbox_head', 'mask_head'):
        cfg.model.roi_head[head].num_classes = 2
    check_config(cfg)
    cfg.train_dataloader.dataset = dict(type='OwnConcat', datasets=[leaf])
    with pytest.raises(ValueError, match='num_classes is 2, .* 10 classes'):
        check_config(cfg)
