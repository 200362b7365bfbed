# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import ReduceOnPlateauLR
from mmengine.registry import (
    HOOKS,
    METRICS,
    MODELS,
    PARAM_SCHEDULERS,
    DefaultScope,
)

from mlla_mm.checks.monitors import check_monitors, metric_keys

from ..bad_data import CLS, DET, SEG, assert_says, config

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

NAMES = ('cat', 'dog', 'owl')


def changed(scope, changes):
    """The nano config of a task, with values in place of its own."""
    cfg = config(scope)
    for key, value in changes.items():
        *parents, name = key.split('.')
        part = cfg
        for parent in parents:
            part = part[parent]
        part[name] = value
    return cfg


def known_keys(scope, evaluator, hooks=()):
    cfg = config(scope)
    cfg.val_evaluator = evaluator
    cfg.default_hooks.mesa = dict(type='NoHook')
    cfg.custom_hooks = list(hooks)
    with DefaultScope.overwrite_default_scope(scope):
        return metric_keys(cfg)


def evaluated_keys(scope, metric, samples, meta=None):
    """The keys of the numbers that a metric gives."""
    with DefaultScope.overwrite_default_scope(scope):
        built = METRICS.build(dict(metric))
    evaluator = Evaluator(built)
    evaluator.dataset_meta = dict(classes=NAMES, **(meta or {}))
    evaluator.process(samples)
    found = evaluator.evaluate(len(samples))
    return [key for key, value in found.items() if not isinstance(value, list)]


THRESHOLDS = (None, 0.1, 0.25)
OF_CLASSIFIERS = [
    dict(type='Accuracy'),
    dict(type='Accuracy', topk=2, prefix='mine'),
    dict(type='Accuracy', topk=(1, 3), thrs=THRESHOLDS),
    dict(type='Accuracy', topk=[1, 2], thrs=[0.5]),
    dict(type='SingleLabelMetric'),
    dict(type='SingleLabelMetric', items=['support', 'recall'], average='micro'),
    dict(type='SingleLabelMetric', average=None),
    dict(type='SingleLabelMetric', thrs=THRESHOLDS),
    dict(type='SingleLabelMetric', thrs=THRESHOLDS, average='micro', prefix='own'),
]


@pytest.mark.parametrize('metric', OF_CLASSIFIERS)
def test_keys_of_classifiers(metric):
    from mmpretrain.structures import DataSample

    samples = [
        DataSample().set_gt_label(i % 3).set_pred_score(torch.rand(3)) for i in range(6)
    ]
    assert known_keys(CLS, metric) == evaluated_keys(CLS, metric, samples)


OF_SEVERAL_LABELS = [
    dict(type='MultiLabelMetric'),
    dict(type='MultiLabelMetric', thr=0.5, topk=2),
    dict(type='MultiLabelMetric', thr=0.3, average='micro'),
    dict(type='MultiLabelMetric', topk=2, items=('f1-score',), average='macro'),
    dict(type='MultiLabelMetric', average=None),
    dict(type='AveragePrecision'),
    dict(type='AveragePrecision', average=None, prefix='own'),
    dict(type='VOCMultiLabelMetric', topk=1),
    dict(type='VOCAveragePrecision', difficult_as_positive=True),
]


@pytest.mark.parametrize('metric', OF_SEVERAL_LABELS)
def test_keys_of_several_labels(metric):
    from mmpretrain.structures import DataSample

    samples = []
    for _ in range(6):
        sample = DataSample().set_pred_score(torch.rand(3))
        sample.set_gt_score(torch.randint(2, (3,))).set_gt_label([0, 1])
        sample.set_field([], 'gt_label_difficult')
        samples.append(sample)
    assert known_keys(CLS, metric) == evaluated_keys(CLS, metric, samples)


OF_SEGMENTORS = [
    dict(type='IoUMetric'),
    dict(type='IoUMetric', iou_metrics='mDice', prefix='digits'),
    dict(type='IoUMetric', iou_metrics=['mIoU', 'mDice', 'mFscore']),
    dict(type='IoUMetric', iou_metrics=['mFscore']),
]


@pytest.mark.parametrize('metric', OF_SEGMENTORS)
def test_keys_of_segmentors(metric):
    maps = torch.randint(3, (2, 1, 8, 8))
    samples = [
        dict(pred_sem_seg=dict(data=x), gt_sem_seg=dict(data=x), img_path='')
        for x in maps
    ]
    assert known_keys(SEG, metric) == evaluated_keys(SEG, metric, samples)


OF_DETECTORS = [
    dict(type='CocoMetric'),
    dict(type='CocoMetric', metric=['bbox', 'segm'], prefix='own'),
    dict(type='CocoMetric', metric='segm', metric_items=['mAP_50', 'AR@100']),
    dict(type='CocoMetric', metric='proposal'),
    dict(type='CocoMetric', metric='proposal', metric_items=['AR_s@1000']),
    dict(type='CocoMetric', metric='proposal_fast', proposal_nums=(1, 10)),
    dict(type='VOCMetric'),
    dict(type='VOCMetric', iou_thrs=[0.3, 0.75]),
    dict(type='VOCMetric', metric=['recall'], proposal_nums=(1, 10)),
    dict(type='VOCMetric', metric='recall', iou_thrs=[0.5, 0.7], prefix='own'),
]


@pytest.fixture
def detections(tmp_path):
    """An annotation file, and a data sample with one object of each class, found."""
    import pycocotools.mask

    boxes = torch.tensor([[2.0, 2.0, 12.0, 12.0]]).repeat(3, 1)
    masks = np.zeros((20, 20), np.uint8)
    masks[2:12, 2:12] = 1
    encoded = pycocotools.mask.encode(np.asfortranarray(masks))
    run_length = dict(encoded, counts=encoded['counts'].decode())
    annotations = [
        dict(id=i + 1, image_id=1, category_id=i, bbox=[2, 2, 10, 10], area=100,
             iscrowd=0, segmentation=run_length)
        for i in range(3)
    ]  # fmt: skip
    content = dict(
        images=[dict(id=1, width=20, height=20, file_name='')],
        categories=[dict(id=i, name=name) for i, name in enumerate(NAMES)],
        annotations=annotations,
    )
    path = tmp_path / 'coco.json'
    path.write_text(json.dumps(content))
    labels = torch.arange(3)
    found = dict(bboxes=boxes, labels=labels, scores=torch.ones(3), masks=[encoded] * 3)
    none = dict(bboxes=torch.zeros(0, 4), labels=labels[:0])
    sample = dict(
        img_id=1,
        ori_shape=(20, 20),
        pred_instances=found,
        gt_instances=dict(bboxes=boxes, labels=labels),
        ignored_instances=none,
    )
    return path, sample


@pytest.mark.parametrize('metric', OF_DETECTORS)
def test_keys_of_detectors(metric, detections):
    path, sample = detections
    if metric['type'] == 'CocoMetric':
        metric = dict(metric, ann_file=str(path))
    assert known_keys(DET, metric) == evaluated_keys(DET, metric, [sample])


def test_keys_of_classes(detections):
    path, sample = detections
    metric = dict(type='CocoMetric', classwise=True, ann_file=str(path))
    first, *others = known_keys(DET, metric)
    found = evaluated_keys(DET, metric, [sample])
    assert found == [*(first.format(**{'class': x}) for x in NAMES), *others]

    cfg = config(DET)
    cfg.val_evaluator.classwise = True
    cfg.default_hooks.checkpoint.save_best = 'coco/owl_precision'
    check_monitors(cfg)


def test_a_metric_that_writes_files_alone_gives_no_keys():
    metric = dict(type='CocoMetric', format_only=True, outfile_prefix='out')
    assert known_keys(DET, metric) == []
    assert known_keys(SEG, dict(type='IoUMetric', format_only=True)) == []
    both = [metric, dict(type='VOCMetric')]
    assert known_keys(DET, both) == ['pascal_voc/mAP', 'pascal_voc/AP50']


def test_keys_of_several_data_sets(detections):
    from mmdet.evaluation import MultiDatasetsEvaluator

    path, sample = detections
    coco = dict(type='CocoMetric', ann_file=str(path))
    cfg = dict(metrics=[coco, dict(type='VOCMetric')], dataset_prefixes=['a', 'b'])
    with DefaultScope.overwrite_default_scope('mmdet'):
        evaluator = MultiDatasetsEvaluator(**cfg)
    for metric in evaluator.metrics:
        metric.dataset_meta = dict(classes=NAMES)
    evaluator._dataset_meta = dict(cumulative_sizes=[1, 2])
    evaluator.process([sample, sample])
    found = evaluator.evaluate(2)
    assert known_keys(DET, dict(cfg, type='MultiDatasetsEvaluator')) == list(found)


@METRICS.register_module()
class OwnMetric:
    pass


@HOOKS.register_module()
class OwnHook(Hook):
    pass


@HOOKS.register_module()
class OwnBest(CheckpointHook):
    """It may know when more of a metric is better."""


@PARAM_SCHEDULERS.register_module()
class OwnPlateau(ReduceOnPlateauLR):
    """It may read another value than a metric."""


@MODELS.register_module()
class OwnModel:
    """MMEngine's loop adds losses that a model gives to the metrics."""


@pytest.mark.parametrize(
    'changes',
    [
        {'val_evaluator': [dict(type='IoUMetric'), dict(type='OwnMetric')]},
        {'val_evaluator': dict(type='OwnMetric')},
        {'val_evaluator': dict(type='IoUMetric', _scope_='mmseg')},
        {'custom_hooks': [dict(type='OwnHook')]},
        {'model.type': 'OwnModel'},
        {'val_cfg.type': 'OwnLoop'},
        {'runner_type': 'OwnRunner'},
        {'default_hooks.checkpoint': dict(type='OwnBest', save_best='x', rule=None)},
    ],
)
def test_own_parts_make_every_key_possible(changes):
    cfg = config(SEG)
    cfg.default_hooks.checkpoint.update(save_best='mine', rule='less')
    with pytest.raises(ValueError, match='mine'):
        check_monitors(cfg)
    # One in the model gives none.
    cfg.model.backbone.type = 'OwnModel'
    with pytest.raises(ValueError, match='mine'):
        check_monitors(cfg)
    cfg.merge_from_dict(changes)
    check_monitors(cfg)


@HOOKS.register_module()
class SaveLowestLoss(CheckpointHook):
    """Somebody's own, which needs no validation."""


def test_own_hooks_may_read_other_numbers():
    cfg = config(SEG)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = dict(type='SaveLowestLoss', save_best='loss')
    check_monitors(cfg)
    cfg.default_hooks.checkpoint.type = 'CheckpointHook'
    with pytest.raises(ValueError, match='val_cfg is None'):
        check_monitors(cfg)


BEST = 'default_hooks.checkpoint.save_best'
STOP = dict(type='EarlyStoppingHook')
PLATEAU = dict(type='ReduceOnPlateauLR')
# What is changed, and what the error says.
ERRORS = [
    (DET, {BEST: 'bbox_mAP'}, [f"{BEST} is 'bbox_mAP'", f"{BEST}='coco/bbox_mAP'",
                               'coco/segm_mAP_75']),
    (CLS, {BEST: ['acc/top1', 'ema_accuracy/top1']},
     [f"{BEST}=['accuracy/top1', 'ema_accuracy/top1']", "'acc/top1'"]),
    (CLS, {BEST: ['accuracy/top1', 'ema_accuracy/top5'], 'val_evaluator.topk': (1,)},
     ["no 'ema_accuracy/top5'", "'accuracy/top1', 'ema_accuracy/top1'"]),
    (CLS, {'default_hooks.mesa': dict(type='NoHook')}, ["no 'ema_accuracy/top1'"]),
    # mmpretrain's hook logs such a key, but gives it to no other hook.
    (CLS, {BEST: 'accuracy/top1_origin', 'custom_hooks': [
        dict(type='EMAHook', evaluate_on_origin=True)]}, ["no 'accuracy/top1_origin'"]),
    (SEG, {BEST: 'mIOU'}, [f"{BEST}='mIoU'", 'mIoU, ', 'aAcc', 'mAcc']),
    (SEG, {BEST: 'mDice'}, ["no 'mDice'"]),
    (SEG, {'custom_hooks': [dict(STOP, monitor='miou')]},
     ["custom_hooks.0.monitor is 'miou'", "custom_hooks.0.monitor='mIoU'"]),
    (SEG, {'custom_hooks': [dict(type='WholeCheckpointHook', save_best='iou',
                                 rule='greater')]}, ['custom_hooks.0.save_best']),
    (DET, {'param_scheduler': PLATEAU}, ["param_scheduler.monitor is 'loss'"]),
    (DET, {'param_scheduler': [dict(type='LinearLR'), dict(PLATEAU, monitor='mAP')]},
     ["param_scheduler.1.monitor is 'mAP'", "='coco/bbox_mAP'"]),
    (DET, {'param_scheduler': dict(one=[dict(PLATEAU, monitor='mAP')])},
     ["param_scheduler.one.0.monitor is 'mAP'"]),
    # No validation, or nothing that it gives.
    (SEG, {BEST: 'mIoU', 'val_cfg': None}, [BEST, 'val_cfg is None', f'{BEST}=None']),
    (SEG, {BEST: 'auto', 'val_evaluator.format_only': True}, [f'{BEST}=None']),
    (DET, {'custom_hooks': [dict(STOP, monitor='x')], 'val_cfg': None},
     ['custom_hooks.0.monitor', 'Remove this hook']),
    (DET, {'param_scheduler': PLATEAU, 'val_cfg': None}, ['Remove this scheduler']),
    (DET, {BEST: 'auto', 'train_cfg.val_begin': 5}, ['val_begin is 5', 'ends at 4']),
    # Rules.
    (SEG, {BEST: 'mFscore', 'val_evaluator.iou_metrics': 'mFscore'},
     ['default_hooks.checkpoint', 'mFscore', "rule='greater'"]),
    (CLS, {BEST: 'auto', 'val_evaluator': dict(
        type='SingleLabelMetric', items=['recall'])}, ['recall', "rule='greater'"]),
    (CLS, {BEST: ['auto'], 'val_evaluator': dict(
        type='SingleLabelMetric', items=['recall'])}, ['recall', "rule='greater'"]),
    (CLS, {'default_hooks.checkpoint.rule': ['greater'] * 3}, ['rule', '3']),
    (CLS, {'default_hooks.checkpoint.rule': 'more'}, ['rule', 'more', 'greater']),
    (SEG, {'custom_hooks': [dict(STOP, monitor='mFscore')],
           'val_evaluator.iou_metrics': ['mIoU', 'mFscore']},
     ['custom_hooks.0', 'mFscore', "rule='greater'"]),
    (SEG, {BEST: ('mIoU', 'mAcc')}, ['list of str']),
    # Keys of two metrics.
    (SEG, {'val_evaluator': [dict(type='IoUMetric')] * 2}, ["'aAcc'", 'prefix']),
]  # fmt: skip


@pytest.mark.parametrize('scope, changes, words', ERRORS)
def test_errors(scope, changes, words):
    cfg = changed(scope, changes)
    with pytest.raises(ValueError) as caught:
        check_monitors(cfg)
    assert_says(caught.value, *words)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'scope, changes',
    [
        (CLS, {}),
        (DET, {}),
        (SEG, {}),
        (CLS, {BEST: 'auto'}),
        (DET, {BEST: 'auto'}),
        (SEG, {BEST: ['auto']}),
        (SEG, {BEST: ['mIoU', 'mAcc']}),
        (SEG, {'val_cfg': None}),
        (DET, {'train_cfg.val_begin': 5}),
        (DET, {'train_cfg.val_begin': 4, BEST: 'auto'}),
        (SEG, {'param_scheduler': dict(PLATEAU, monitor='mIoU', rule='greater')}),
        (SEG, {'param_scheduler': dict(type='OwnPlateau', monitor='x')}),
        (SEG, {'custom_hooks': [dict(STOP, monitor='mFscore', rule='greater')],
               'val_evaluator.iou_metrics': ['mIoU', 'mFscore']}),
    ],
)  # fmt: skip
def test_what_is_right(scope, changes):
    check_monitors(changed(scope, changes))
