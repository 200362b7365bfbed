# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images that cannot be read, and unusual ones that can."""

import json
import re
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mlla_mm.checks.data import check_data
from mlla_mm.datasets.corrupt_images import CorruptImageError
from mlla_mm.engine import options
from mlla_mm.reproducible.seeding import SAMPLE, Draw, SeededDataset

from .. import bad_data
from ..bad_data import (  # fmt: skip
    CLS,
    DET,
    HEIGHT,
    MAKE,
    SEG,
    WIDTH,
    assert_says,
    coco_content,
    config,
    cut_end,
    empty,
    noise,
    save,
    truncate,
    turned,
    web_page,
)
from ..nano import CONFIGS, NANO, build
from ..runs import without_workers

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


# Images in training.


def seeded(scope, root, **options):
    with DefaultScope.overwrite_default_scope(scope):
        dataset = config(scope, root).train_dataloader.dataset
        return SeededDataset(dataset, **options)


SKIP = 'train_cfg.skip_corrupt_images=True'
READ_ERRORS = {
    'truncated JPEG': ('images/1.jpg', truncate, 'is truncated'),
    'JPEG without its end': ('images/1.jpg', cut_end, 'is truncated'),
    'zero bytes': ('images/1.jpg', empty, 'is empty'),
    'web page': ('images/1.jpg', web_page, 'is not an image'),
    'PostScript': ('images/1.jpg', bad_data.postscript, 'is not an image'),
    'bomb': ('images/1.jpg', bad_data.bomb, 'is of 1080000000 pixels'),
    'pipe': ('images/1.jpg', bad_data.pipe, 'is a pipe'),
    'device': ('images/1.jpg', bad_data.endless, 'is a pipe'),
    'piped label map': ('maps/1.png', bad_data.pipe, 'is a pipe'),
    'truncated label map': ('maps/1.png', truncate, 'is truncated'),
    'empty label map': ('maps/1.png', empty, 'is empty'),
}


@pytest.mark.parametrize('case', READ_ERRORS)
@pytest.mark.usefixtures('no_waiting')
def test_images_in_training(masks, case, monkeypatch, tmp_path_factory):
    marker = bad_data.fake_ghostscript(monkeypatch, tmp_path_factory.mktemp('bin'))
    name, spoil, problem = READ_ERRORS[case]
    dataset = seeded(SEG, masks)
    spoil(masks / name)
    with pytest.raises(CorruptImageError) as caught:
        dataset[Draw(1, (SAMPLE, 0, 0, 1))]
    assert_says(caught.value, f'{masks / name} {problem}', SKIP)
    assert dataset[Draw(0, (SAMPLE, 0, 0, 0))] is not None
    assert not marker.exists()


def test_names_in_errors_are_printable(masks):
    image, label_map = 'images/1\x1b[31m\n.jpg', 'maps/1\x1b[31m\n.png'
    (masks / 'images/1.jpg').rename(masks / image)
    (masks / 'maps/1.png').rename(masks / label_map)
    dataset = seeded(SEG, masks)
    truncate(masks / image)
    with pytest.raises(CorruptImageError) as caught:
        dataset[1]
    assert_says(caught.value, r'1\x1b[31m\n.jpg is truncated')
    assert str(caught.value).isprintable()


def test_a_decoder_that_fills_up(masks, monkeypatch):
    """OpenCV before 4.12 gives grey where a JPEG file is cut off, without an error."""
    dataset = seeded(SEG, masks)
    truncate(masks / 'images/1.jpg')
    whole = noise(HEIGHT, WIDTH, 3)
    monkeypatch.setattr('mmcv.imfrombytes', lambda content, **_: whole.copy())
    # The patched function would read label maps, too.
    dataset.pipeline.transforms.pop(1)
    with pytest.raises(CorruptImageError, match='1.jpg is truncated'):
        dataset[1]


def test_errors_of_transforms_stay_as_they_are(masks):
    dataset = seeded(SEG, masks)

    def fail(results):
        raise RuntimeError('a transform of mine')

    dataset.pipeline.transforms.append(fail)
    with pytest.raises(RuntimeError, match='^a transform of mine$'):
        dataset[1]


def names_drawn(root, workers):
    """Images that twelve draws give, and how often one was skipped."""
    dataset = seeded(SEG, root, skip_corrupt_images=True)
    draws = [Draw(i, (SAMPLE, 0, 0, i)) for i in range(12)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, sampler=draws, num_workers=workers, collate_fn=list
    )
    samples = [sample for batch in loader for sample in batch]
    names = [Path(sample['data_samples'].img_path).stem for sample in samples]
    return names, dataset.skipped.value


@pytest.mark.filterwarnings('ignore:Skipped')
def test_corrupt_images_are_skipped_and_counted(masks):
    for i in range(3, 12):
        shutil.copy(masks / 'images/0.jpg', masks / f'images/{i}.jpg')
        shutil.copy(masks / 'maps/0.png', masks / f'maps/{i}.png')
    # In the order of their names: 0, 1, 10, 11, 2, 3, ...
    order = sorted(map(str, range(12)))
    corrupt = {'1': 'images/1.jpg', '2': 'images/2.jpg', '5': 'maps/5.png'}
    for name in corrupt.values():
        truncate(masks / name)
    names, count = names_drawn(masks, workers=0)
    for name, expected in zip(names, order):
        assert (name == expected) == (expected not in corrupt)
        assert name not in corrupt
    # More than three if one of them was drawn in the place of another.
    assert 3 <= count < 12
    assert names_drawn(masks, workers=2) == (names, count)


def test_nothing_but_corrupt_images(masks):
    for path in masks.glob('images/*'):
        truncate(path)
    dataset = seeded(SEG, masks, skip_corrupt_images=True)
    with pytest.warns(UserWarning, match=r'Skipped: .*\.jpg is truncated'):
        with pytest.raises(CorruptImageError, match='is truncated'):
            dataset[Draw(0, (SAMPLE, 0, 0, 0))]


# Images in evaluations.

EVALUATION_ERRORS = [
    *((SEG, *error) for error in READ_ERRORS.values()),
    (DET, 'images/1.jpg', truncate, 'is truncated'),
    (DET, 'images/1.jpg', empty, 'is empty'),
    (DET, 'images/1.jpg', web_page, 'is not an image'),
    (DET, 'images/1.jpg', lambda path: save(path, noise(10, 20000, 3)),
     'is of 20000 x 10 pixels'),
    (CLS, 'val/1/image.png', truncate, 'is truncated'),
    (CLS, 'val/1/image.png', empty, 'is empty'),
    (CLS, 'val/1/image.png', web_page, 'is not an image'),
    (CLS, 'val/1/image.png', bad_data.endless, 'is a pipe'),
    (DET, 'images/1.jpg', bad_data.pipe, 'is a pipe'),
]  # fmt: skip


def evaluated(scope, root, split='val'):
    """The data set of an evaluation, as the loops that our configs name build it."""
    cfg = config(scope, root)
    if split == 'test':
        cfg.test_dataloader = cfg.val_dataloader
        options.enable_tta(cfg)
    loader = dict(cfg[f'{split}_dataloader'], num_workers=0, persistent_workers=False)
    runner = Runner(
        torch.nn.Identity(),
        str(root / 'work'),
        **{
            f'{split}_dataloader': loader,
            f'{split}_cfg': dict(type=f'Checked{split.capitalize()}Loop'),
            f'{split}_evaluator': dict(type='DumpResults', out_file_path='no.pkl'),
        },
        default_scope=scope,
        experiment_name=str(root),
    )
    return getattr(runner, f'{split}_dataloader').dataset


@pytest.mark.parametrize('case', range(len(EVALUATION_ERRORS)))
@pytest.mark.usefixtures('no_waiting')
def test_images_in_evaluations(tmp_path, case):
    """They are never skipped, so the error does not offer it."""
    scope, name, spoil, problem = EVALUATION_ERRORS[case]
    MAKE[scope](tmp_path)
    dataset = evaluated(scope, tmp_path)
    assert dataset.metainfo['classes'] and len(dataset) in (3, 10)
    spoil(tmp_path / name)
    with pytest.raises(CorruptImageError) as caught:
        dataset[1]
    assert_says(caught.value, f'{tmp_path / name} {problem}', 'Replace it')
    assert SKIP not in str(caught.value)
    assert dataset[0] is not None


@pytest.mark.parametrize('name', ['images/1.jpg', 'maps/1.png'])
@pytest.mark.parametrize('split', ['val', 'test'])
def test_a_decoder_that_fills_up_in_evaluations(masks, monkeypatch, split, name):
    """Also with test-time augmentation, whose samples are lists."""
    dataset = evaluated(SEG, masks, split)
    whole = {name: dataset[1]}
    truncate(masks / name)
    monkeypatch.setattr(type(dataset.dataset), '__getitem__', lambda *_: whole[name])
    with pytest.raises(CorruptImageError, match=f'{name} is truncated'):
        dataset[1]


# Images that are unusual, but no error.


UNUSUAL = {
    'grey': (noise(HEIGHT, WIDTH), {}),
    'RGBA': (noise(HEIGHT, WIDTH, 4), {}),
    '16 bit': (noise(HEIGHT, WIDTH).astype(np.uint16) * 257, {}),
    '1x1': (noise(1, 1, 3), {}),
    '20000x10': (noise(10, 20000, 3), {}),
    'EXIF-rotated': (noise(HEIGHT, WIDTH, 3), turned(6)),
    'EXIF-transposed': (noise(HEIGHT, WIDTH, 3), turned(5)),
}


FULL = {
    DET: 'detection/mask-rcnn_mlla-t_fpn_1x_coco.py',
    SEG: 'segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512.py',
    CLS: 'classification/mlla-t_8xb128_in1k.py',
}
PREDICTIONS = {DET: 'pred_instances', SEG: 'pred_sem_seg', CLS: 'pred_score'}
# The demos resize them to less than a pixel; mmseg wants two rows and columns.
TOO_THIN = {
    ('demo', '20000x10', DET),
    ('demo', '20000x10', SEG),
    ('demo', '1x1', SEG),
    ('full', '1x1', SEG),
}


def write_everywhere(root, pixels, **kwargs):
    """One image, as data of any task; returns its size as mmcv reads it."""
    height, width = pixels.shape[:2]
    if kwargs:
        height, width = width, height
    save(root / 'images/0.png', pixels, **kwargs)
    save(root / 'maps/0.png', np.ones((height, width), np.uint8))
    for i in range(10):
        save(root / f'train/{i}/0.png', pixels, **kwargs)
    content = coco_content()
    content['images'] = [dict(id=0, file_name='0.png', width=width, height=height)]
    for annotation in content['annotations']:
        annotation.update(
            image_id=0,
            bbox=[0, 0, width, height],
            area=width * height,
            segmentation=[[0, 0, width, 0, width, height, 0, height]],
        )
    (root / 'coco.json').write_text(json.dumps(content))
    return height, width


@lru_cache
def model(scope):
    return build(config(scope)).eval()


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
@pytest.mark.parametrize('case', UNUSUAL)
@pytest.mark.parametrize('recipe', ['demo', 'full'])
def test_unusual_images(tmp_path, recipe, case, scope):
    """By the demo's and the published training pipeline, and by the demo's model."""
    pixels, options = UNUSUAL[case]
    size = write_everywhere(tmp_path, pixels, **options)
    cfg = config(scope, tmp_path, suffix='.png')
    dataset = cfg.train_dataloader.dataset
    if recipe == 'full':
        full = Config.fromfile(CONFIGS / FULL[scope])
        dataset.pipeline = full.train_dataloader.dataset.pipeline
    # Our detection configs leave out images below 32 pixels in training.
    dataset.pop('filter_cfg', None)
    cfg.allow_empty_classes = True  # a label map has one label
    assert not any(x.fatal for x in check_data(cfg, 'train').findings)
    with DefaultScope.overwrite_default_scope(scope):
        dataset = SeededDataset(dataset)
        draw = Draw(0, (SAMPLE, 0, 0, 0))
        if (recipe, case, scope) in TOO_THIN:
            with pytest.raises(CorruptImageError) as caught:
                dataset[draw]
            pixels = f'{size[1]} x {size[0]} pixels'
            assert_says(caught.value, f'{tmp_path}/images/0.png', pixels, SKIP)
            return
        sample = dataset[draw]
        # The ImageNet recipe does not turn images, as its authors do not.
        as_stored = options and (recipe, scope) == ('full', CLS)
        expected = size[::-1] if as_stored else size
        assert sample['data_samples'].ori_shape == expected
        if recipe == 'demo':
            batch = {key: [value] for key, value in sample.items()}
            with torch.no_grad():
                (result,) = model(scope).test_step(batch)
            assert PREDICTIONS[scope] in result


# Runs.


def train_on_two(run_tool, root, work_dir, *more):
    """An epoch of the classification demo; the result, and what is said of errors."""
    result = run_tool(
        'python', 'tools/train.py', NANO[CLS], '--seed', 0, '--work-dir', work_dir,
        '--launcher', 'pytorch', '--cfg-options',
        *without_workers(root, 'train', 'val'), 'train_dataloader.batch_size=5',
        'train_cfg.max_epochs=1', 'val_evaluator.topk=1', *more,
        check=False, processes=2,
    )  # fmt: skip
    return result, [x for x in result.stdout.splitlines() if x.startswith('Error: ')]


def test_corrupt_image_ends_training(run_tool, folders, tmp_path):
    """Whichever of the processes meets it."""
    truncate(folders / 'train/7/image.png')
    result, errors = train_on_two(run_tool, folders, tmp_path / 'work')
    assert result.returncode == 1
    (error,) = errors
    assert_says(error, f'{folders}/train/7/image.png is truncated', SKIP)


@pytest.mark.slow
def test_corrupt_image_ends_a_validation(run_tool, folders, tmp_path):
    """Images of an evaluation are never skipped."""
    truncate(folders / 'val/7/image.png')
    result, errors = train_on_two(run_tool, folders, tmp_path / 'work', SKIP)
    assert result.returncode == 1
    (error,) = errors
    assert_says(error, f'{folders}/val/7/image.png is truncated', 'Replace it')


@pytest.mark.parametrize('scope, name', [(DET, 'images/1.jpg'), (SEG, 'maps/1.png')])
def test_corrupt_image_ends_a_test(run_tool, nano, tmp_path, scope, name):
    """Its data worker's error is the run's."""
    MAKE[scope](tmp_path)
    truncate(tmp_path / name)
    cfg = config(scope, tmp_path)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_evaluator = cfg.val_evaluator
    if scope == DET:
        cfg.test_evaluator.ann_file = str(tmp_path / 'coco.json')
    cfg.dump(tmp_path / 'config.py')
    _, checkpoint = nano(scope)
    result = run_tool(
        'python', 'tools/test.py', tmp_path / 'config.py', checkpoint,
        '--work-dir', tmp_path / 'work', check=False,
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert_says(last, f'Error: {tmp_path / name} is truncated', 'Replace it')
    assert 'Traceback' not in result.stdout


def test_skipped_images_of_all_processes_are_counted(run_tool, folders, tmp_path):
    for i in (2, 7):
        truncate(folders / f'train/{i}/image.png')
    result, errors = train_on_two(run_tool, folders, tmp_path / 'work', SKIP)
    assert result.returncode == 0 and not errors, result.stdout
    counts = re.findall(r'Epoch 1: (\d+) corrupt images skipped', result.stdout)
    # There are more if a corrupt image was drawn to replace another one.
    names = re.findall(r'Skipped: (\S+) is truncated', result.stdout)
    assert counts == [str(len(names))] and len(names) >= 2
