# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Updates and evaluations on 1, 2 and 4 processes."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Dict, List

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet
from mlla_mm.reproducible.seeding import UPDATE, seed_generators

from ..nano import NANO, build
from ..processes import run_tool

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

DET, SEG, CLS = 'mmdet', 'mmseg', 'mmpretrain'
COUNTS = (1, 2, 4)
SEED = 1


MAKERS = {DET: make_coco, SEG: make_ade20k, CLS: make_imagenet}


@pytest.fixture(scope='module')
def data(once):
    """20 images do not fill the third update; 5 cannot be shared equally."""

    def fill(folder):
        for scope, make in MAKERS.items():
            make(folder / scope, train=20, val=5, size=64)

    folder = once('process_counts', fill)
    return {scope: folder / scope for scope in MAKERS}


def config(scope: str, root: Path) -> Config:
    cfg = Config.fromfile(NANO[scope])
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{root}/'
    if scope == DET:
        for split in ('val', 'test'):
            path = f'{root}/annotations/instances_val.json'
            cfg[f'{split}_evaluator'].ann_file = path
    cfg.randomness = dict(seed=SEED)
    cfg.default_hooks.checkpoint.interval = 100
    return cfg


def run(folder: Path, tool: str, cfg: Config, processes: int, *arguments) -> Path:
    """Run a tool with a config, and return the work_dir."""
    folder.mkdir()
    cfg.dump(folder / 'config.py')
    command = [
        'python', f'tools/{tool}', folder / 'config.py', *arguments,
        '--work-dir', folder / 'work',
    ]  # fmt: skip
    if processes == 1:
        run_tool(*command)
    else:
        run_tool(*command, '--launcher', 'pytorch', processes=processes)
    return folder / 'work'


# Updates.


def record(folder: Path, cfg: Config, total_batch: int, processes: int) -> List[dict]:
    """Train, and return the records of the processes for each update."""
    cfg.train_dataloader.batch_size = total_batch // processes
    cfg.custom_imports.imports.append('tests.recorder')
    cfg.custom_hooks = [dict(type='UpdateRecorder')]
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.save_best = None
    work_dir = run(folder, 'train.py', cfg, processes)
    count = len(list(work_dir.glob('update_*_0.pth')))
    return [
        [
            torch.load(work_dir / f'update_{number}_{rank}.pth', weights_only=False)
            for rank in range(processes)
        ]
        for number in range(count)
    ]


def images(update: List[dict]) -> List[str]:
    samples = [sample for part in update for sample in part['batch']['data_samples']]
    return sorted(sample.img_path for sample in samples)


def mean_losses(update: List[dict]) -> Dict[str, float]:
    names = [name for name in update[0]['losses'] if 'acc' not in name]
    return {
        name: float(np.mean([part['losses'][name] for part in update]))
        for name in names
    }


# Dropout is meant to differ between processes. With the demo's class weights, a loss
# would be a mean over the weights of the process's own pixels.
PLAIN_HEAD = dict(
    dropout_ratio=0.0,
    loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, _delete_=True),
)
TASKS = {
    'segmentation': (
        SEG,
        {
            'model.decode_head': PLAIN_HEAD,
            'model.auxiliary_head': PLAIN_HEAD,
            'train_cfg.max_iters': 10,
        },
    ),
    # The average is the teacher in the second half.
    'classification': (
        CLS,
        {
            'train_cfg.max_epochs': 5,
            'default_hooks.mesa': dict(decay=0.9, start=0.5),
            # A worker draws an image's box and noise. (Mixing pairs the images of a
            # process, so it differs by intent.)
            'train_dataloader.dataset.pipeline': [
                *Config.fromfile(NANO[CLS]).train_pipeline,
                dict(type='mlla_mm.datasets.transforms.erasing.DrawErasing', prob=0.6),
            ],
        },
    ),
    # The losses of a detector are means over each process's own positives.
    'detector below its heads': (
        DET,
        {
            'model.type': 'BackboneAndNeck',
            'model.backbone.drop_path_rate': 0.0,
            'train_dataloader.dataset.pipeline.2.scale': (64, 64),
            'find_unused_parameters': True,
            'train_cfg.max_epochs': 4,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_updates_on_any_number_of_processes(data, tmp_path, task):
    """The recipe's optimiser, clipping, schedule and augmentations; total batch 8.

    A gradient's error is taken relative to the norm of the same parameter's, so that no
    large one hides that of another.
    """
    scope, changes = TASKS[task]
    runs = []
    for count in COUNTS:
        cfg = config(scope, data[scope])
        cfg.merge_from_dict(changes)
        cfg.custom_imports.imports.append('tests.float64')
        runs.append(record(tmp_path / str(count), cfg, 8, count))
    expected, *others = runs
    assert len(expected) >= 10
    for updates in others:
        assert len(updates) == len(expected)
        for a, b in zip(updates, expected):
            assert images(a) == images(b)
            found, losses = mean_losses(a), mean_losses(b)
            scale = losses.pop('size', losses['loss'])
            for name, value in losses.items():
                assert abs(found[name] - value) < 1e-6 * scale, name
            gradients = a[0]['gradients']
            assert set(gradients) == set(b[0]['gradients'])
            for name, gradient in b[0]['gradients'].items():
                assert gradient.dtype == torch.float64
                error = (gradients[name] - gradient).norm() / gradient.norm()
                assert error < 1e-9, name


def shard_alone(cfg: Config, weights: dict, part: dict, process: int, number: int):
    """Losses and gradients of one process's batch, in one process."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = build(cfg)
        model.load_state_dict(weights)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        seed_generators(UPDATE, SEED, number, process)
        batch = model.data_preprocessor(part['batch'], training=True)
        loss, logs = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.item() for name, value in logs.items()}, gradients


def test_mask_rcnn_on_two_processes_is_the_mean_of_its_shards(data, tmp_path):
    cfg = config(DET, data[DET])
    cfg.model.backbone.drop_path_rate = 0.2
    cfg.train_cfg.max_epochs = 1
    updates = record(tmp_path / 'run', cfg, 8, processes=2)
    assert len(updates) == 3
    for number, update in enumerate(updates):
        shards = []
        for process, part in enumerate(update):
            losses, gradients = shard_alone(
                cfg, update[0]['weights'], part, process, number
            )
            assert part['losses'] == pytest.approx(losses, rel=1e-5)
            shards.append(gradients)
        first, second = (part['losses']['loss'] for part in update)
        assert first != pytest.approx(second, rel=1e-3)
        for name, gradient in update[0]['gradients'].items():
            mean = (shards[0][name] + shards[1][name]) / 2
            assert (gradient - mean).norm() < 1e-5 * mean.norm(), name


# Evaluations.


def evaluate(folder: Path, scope: str, cfg: Config, weights: Path, processes: int):
    """Metrics of tools/test.py, and the predictions of all images in their order."""
    out = folder / ('maps' if scope == SEG else 'predictions.pkl')
    work_dir = run(folder, 'test.py', cfg, processes, weights, '--out', out)
    if scope == SEG:
        found = [cv2.imread(str(x)).tolist() for x in sorted(out.iterdir())]
    else:
        found = [without_arrays(x) for x in pickle.loads(out.read_bytes())]
    return metrics(work_dir), found


def metrics(work_dir: Path) -> Dict[str, float]:
    (path,) = work_dir.glob('*/*.json')
    return without_times(json.loads(path.read_text()))


def without_times(values: Dict[str, float]) -> Dict[str, float]:
    return {key: value for key, value in values.items() if 'time' not in key}


def without_arrays(value):
    if isinstance(value, dict):
        return {key: without_arrays(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, 'tolist') else value


def evaluated_config(scope: str, root: Path) -> Config:
    cfg = config(scope, root)
    if scope == DET:
        # With a low threshold, a model with random weights detects something.
        cfg.model.test_cfg.rcnn.score_thr = 0.0
    if scope == CLS:
        # Larger batches can change the last bits, which is not what this tests.
        cfg.val_dataloader.batch_size = cfg.test_dataloader.batch_size = 1
    return cfg


@pytest.fixture(scope='module')
def evaluated(data, nano, once):
    """The data sets, and models of random weights that predict some images right.

    For the detector, some of its detections are made the truth.
    """
    weights = {scope: nano(scope)[1] for scope in data}

    def fill(folder):
        root = shutil.copytree(data[DET], folder / DET)
        cfg = evaluated_config(DET, root)
        _, found = evaluate(folder / 'run', DET, cfg, weights[DET], 1)
        path = root / 'annotations/instances_val.json'
        path.write_text(json.dumps(with_truth(json.loads(path.read_text()), found)))

    return {**data, DET: once('evaluated', fill) / DET}, weights


def with_truth(content: dict, found: List[dict]) -> dict:
    """An annotation file in which every seventh detection is right."""
    ids = {category['name']: category['id'] for category in content['categories']}
    content['annotations'] = []
    for image in found:
        detections = image['pred_instances']
        for label, (left, top, right, bottom) in list(
            zip(detections['labels'], detections['bboxes'])
        )[::7]:
            width, height = right - left, bottom - top
            if min(width, height) < 1:  # mmdet leaves such objects out
                continue
            content['annotations'].append(
                dict(
                    id=len(content['annotations']) + 1,
                    image_id=image['img_id'],
                    category_id=ids[str(label)],
                    bbox=[left, top, width, height],
                    area=width * height,
                    segmentation=[[left, top, right, top, right, bottom, left, bottom]],
                    iscrowd=0,
                )
            )
    return content


@pytest.mark.parametrize(
    'scope, count',
    [
        (DET, 2),
        (CLS, 2),
        pytest.param(DET, 4, marks=pytest.mark.slow),
        pytest.param(SEG, 2, marks=pytest.mark.slow),
        pytest.param(SEG, 4, marks=pytest.mark.slow),
        pytest.param(CLS, 4, marks=pytest.mark.slow),
    ],
)
def test_evaluation_on_any_number_of_processes(evaluated, tmp_path, scope, count):
    """All metrics and predictions of tools/test.py are equal to the last digit."""
    data, weights = evaluated
    cfg = evaluated_config(scope, data[scope])
    expected, found = (
        evaluate(tmp_path / str(n), scope, cfg, weights[scope], n) for n in (1, count)
    )
    values, predictions = expected
    assert max(values.values()) > 0
    assert len(predictions) == 5
    assert found == expected


@pytest.mark.slow
def test_test_time_augmentation_on_any_number_of_processes(evaluated, tmp_path):
    data, weights = evaluated
    cfg = config(SEG, data[SEG])
    expected, *others = (
        metrics(run(tmp_path / str(n), 'test.py', cfg, n, weights[SEG], '--tta'))
        for n in COUNTS
    )
    assert expected['mIoU'] > 0
    assert others == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize('scope', [DET, SEG, CLS])
def test_validation_on_any_number_of_processes(evaluated, tmp_path, scope):
    """In training with a learning rate of 0, which keeps the checkpoint's weights."""
    data, weights = evaluated
    cfg = evaluated_config(scope, data[scope])
    values, _ = evaluate(tmp_path / 'test', scope, cfg, weights[scope], 2)
    cfg.load_from = str(weights[scope])
    cfg.optim_wrapper.optimizer.lr = 0.0
    cfg.train_dataloader.batch_size = 1
    cfg.train_cfg.update(
        {'max_iters': 2} if scope == SEG else {'max_epochs': 1}, val_interval=1
    )
    # This keeps the statistics of BatchNorm.
    cfg.custom_imports.imports.append('tests.recorder')
    cfg.custom_hooks = [dict(type='UpdateRecorder')]
    expected, *others = (
        validations(run(tmp_path / str(count), 'train.py', cfg, count))
        for count in COUNTS
    )
    assert others == [expected, expected]
    assert values and values.items() <= expected[-1].items()


def validations(work_dir: Path) -> List[Dict[str, float]]:
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    # The number of the last update depends on that of the processes.
    return [
        without_times({key: value for key, value in entry.items() if key != 'step'})
        for entry in entries
        if 'lr' not in entry
    ]
