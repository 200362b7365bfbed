# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The benchmark of data, on synthetic pictures."""

import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torchvision import transforms

from benchmarks import data, pictures
from benchmarks.data import Measured, cores_needed, format_measured, load
from benchmarks.timm_pipeline import TimmDataset
from mlla_mm.checks.data import check_data
from mlla_mm.datasets.corrupt_images import CheckedDataset

from ..bad_data import CLS, DET, SEG
from ..nano import CONFIGS, NANO
from ..pretended import needs_pretended_cuda

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

from mmpretrain.structures import DataSample  # noqa: E402

TOOL = 'tools/analysis_tools/data_speed.py'
RECIPES = {
    DET: 'detection/mask-rcnn_mlla-t_fpn_1x_coco.py',
    SEG: 'segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512.py',
    CLS: 'classification/mlla-t_8xb128_in1k.py',
}


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
def test_pictures_are_data_of_the_recipe(scope, tmp_path):
    """Our own checks of data find nothing wrong, and the pipeline runs."""
    cfg = Config.fromfile(CONFIGS / RECIPES[scope])
    loader = cfg.train_dataloader
    before = json.dumps(loader.dataset)
    with DefaultScope.overwrite_default_scope(scope):
        dataset = pictures.write_pictures(loader.dataset, scope, tmp_path, 6)
        assert json.dumps(loader.dataset) == before
        loader.dataset = dataset
        cfg.allow_empty_classes = True
        report = check_data(cfg, 'train')
        # Few pictures have few of the classes.
        findings = [x.problem for x in report.findings if 'classes of' not in x.problem]
        assert findings == []
        counts = report.counts['train']
        assert counts.images == 6
        built = CheckedDataset(dataset)
        assert len(built) == 6 and built[0]['inputs'].ndim == 3
    if scope == DET:
        assert 3 < sum(counts.numbers) / 6 < 14
    image = cv2.imread(str(tmp_path / 'images/00000.jpg'))
    assert image.shape[1::-1] == pictures.SIZES[scope]
    size = (tmp_path / 'images/00000.jpg').stat().st_size
    # Bits of a pixel, as in photographs of this quality.
    assert 3 < 8 * size / (image.size / 3) < 8


def test_errors_of_pictures(tmp_path):
    one = dict(type='A')
    with pytest.raises(ValueError, match="'other'"):
        pictures.write_pictures(one, 'other', tmp_path, 1)
    two = dict(type='ConcatDataset', datasets=[one, one])
    with pytest.raises(ValueError, match='not 2'):
        pictures.write_pictures(two, CLS, tmp_path, 1)


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
def test_the_tool(scope, call_tool, tmp_path):
    phase = 'val' if scope == SEG else 'train'
    output = call_tool(
        TOOL, NANO[scope], '--synthetic', '--images', 3, '--repeats', 1, '--seconds',
        0.01, '--phase', phase, '--model-speed', 1e9, '--device', 'cpu',
        '--out', tmp_path, '--cfg-options', f'{phase}_dataloader.num_workers=0',
        f'{phase}_dataloader.persistent_workers=False',
        f'{phase}_dataloader.batch_size=2',
    ).stdout  # fmt: skip
    found = json.loads((tmp_path / 'data_speed.json').read_text())
    assert (found['phase'], found['images'], found['synthetic']) == (phase, 3, True)
    pipeline = Config.fromfile(NANO[scope])[f'{phase}_dataloader'].dataset.pipeline
    steps = [name.split()[1] for name in found['steps'] if name[0].isdigit()]
    assert len(steps) == len(pipeline)
    assert all(f'| {i + 1} {name}' in output for i, name in enumerate(steps))
    assert '- reading files' in output
    assert sum(found['steps'].values()) > 0
    assert found['loader'] > 0 and found['preprocessor'] > 0
    assert f'{1000 / found["milliseconds"]:.4g} images/s' in output


@needs_pretended_cuda
def test_count_of_the_recipes_preprocessor():
    """Mixup of erased images in float32: its passes over the batch, one by one."""
    cfg = Config.fromfile(CONFIGS / RECIPES[CLS])
    size, pixels = 8, 8 * 3 * 32 * 32
    samples = [DataSample().set_gt_label(i) for i in range(size)]
    samples[0].set_metainfo(dict(erasing=(2, 3, 10, 9, 5)))
    batch = dict(
        inputs=torch.zeros(size, 3, 32, 32, dtype=torch.uint8), data_samples=samples
    )
    options = dict(cfg.model.data_preprocessor, num_classes=10)
    with DefaultScope.overwrite_default_scope(CLS):
        plain = MODELS.build(dict(options))
        options['batch_augments'] = dict(augments=cfg.model.train_cfg.augments[:1])
        mixing = MODELS.build(options)
    total = data.count_preprocessor(plain, batch, False)
    # The copy, the flip, to float, less the mean, through the deviation.
    passes = pixels * (2 + 2 + 5 + 8 + 8)
    assert total.bytes == pytest.approx(passes, rel=0.01)
    total = data.count_preprocessor(mixing, batch, True)
    # Both images are weighted, one of them is flipped, and they are added.
    passes += pixels * (8 + 8 + 8 + 12)
    erased = 2 * 8 * 3 * 10 * 9 - 4 * 3 * 10 * 9
    assert passes + erased < total.bytes < (passes + erased) * 1.01


def test_the_fastest_round_of_each_image():
    rounds = [
        [{'all': 0.009, '1 Load': 0.001}, {'all': 0.004, '1 Load': 0.002}],
        [{'all': 0.005, '1 Load': 0.003}, {'all': 0.008}],
    ]
    assert data._fastest(rounds) == pytest.approx({'all': 4.5, '1 Load': 0.5})


MEASURED = Measured(
    config='c.py', phase='train', images=8, milliseconds=8.0,
    steps={'reading files': 0.4, '1 Load': 2.0, '10 Pack': 1.0, '2 Crop': 4.0},
    timm=6.0, workers=4, cores=2, loader=200.0, preprocessor=0.5,
)  # fmt: skip


def test_format():
    lines = format_measured(MEASURED).splitlines()
    cells = [[x.strip() for x in line.split('|')[1:-1]] for line in lines]
    cells = [row for row in cells if len(row) == 3]
    assert [row[0].split(',')[0] for row in cells[2:]] == [
        '1 Load', '- reading files', '2 Crop', '10 Pack', 'all',
    ]  # fmt: skip
    assert cells[2][1:] == ['2', '25%'] and cells[-1][1] == '8'
    text = '\n'.join(lines)
    assert 'One core: 125 images/s' in text and '0.75x as fast' in text
    assert '4 workers on 2 cores: 200 images/s' in text
    assert 'at most 500 images/s' in text  # 4 workers, each with a core
    assert 'timm' not in format_measured(MEASURED._replace(timm=None))


@pytest.mark.parametrize(
    'speed, rate, cores', [(1000, 125, 8), (1001, 125, 9), (10, 125, 1)]
)
def test_cores(speed, rate, cores):
    assert cores_needed(speed, rate) == cores
    text = format_measured(MEASURED, speed)
    assert f'needs {cores} cores' in text and 'at most' not in text


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_of_the_loader(workers, tmp_path, monkeypatch):
    """Each worker's share is counted behind what was loaded in advance."""
    cfg = Config.fromfile(NANO[CLS])
    with DefaultScope.overwrite_default_scope(CLS):
        loader = cfg.train_dataloader
        loader.dataset = pictures.write_pictures(loader.dataset, CLS, tmp_path, 5)
        loader.update(batch_size=4, num_workers=workers, persistent_workers=workers > 0)
        times = iter([10.0, 12.0])
        monkeypatch.setattr(
            data, 'time', SimpleNamespace(perf_counter=lambda: next(times))
        )
        rate, batch = load(loader, length=5, seconds=1, rate=15)
    assert batch['inputs'].shape == (4, 3, 64, 64)
    # 15 images are 4 batches, or 2 of each worker.
    assert rate == 16 / 2


@pytest.fixture
def pretended_timm(monkeypatch):
    """timm's names, with a transform of torchvision."""
    asked = {}

    def create_transform(**options):
        asked.update(options)
        return transforms.Compose(
            [transforms.Resize(options['input_size']), transforms.ToTensor()]
        )

    constants = SimpleNamespace(
        IMAGENET_DEFAULT_MEAN=(0.5, 0.5, 0.5), IMAGENET_DEFAULT_STD=(0.5, 0.5, 0.5)
    )
    monkeypatch.setitem(sys.modules, 'timm', SimpleNamespace())
    modules = SimpleNamespace(create_transform=create_transform)
    monkeypatch.setitem(sys.modules, 'timm.data', modules)
    monkeypatch.setitem(sys.modules, 'timm.data.constants', constants)
    return asked


class _Files:
    def __init__(self, path):
        self.path = str(path)

    def __len__(self):
        return 1

    def get_data_info(self, index):
        return dict(img_path=self.path)


@pytest.mark.parametrize('is_training', [True, False])
def test_transforms_of_the_authors(pretended_timm, tmp_path, is_training):
    cv2.imwrite(str(tmp_path / 'grey.png'), np.full((40, 30), 255, np.uint8))
    dataset = TimmDataset(_Files(tmp_path / 'grey.png'), 16, is_training)
    image = dataset[0]
    assert image.shape[0] == 3 and image.shape[2] == 16
    assert float(image.max()) == 1
    if is_training:
        # As in the authors' arguments.
        assert pretended_timm['re_prob'] == 0.25
        assert pretended_timm['auto_augment'] == 'rand-m9-mstd0.5-inc1'
    else:
        assert float(image.min()) == 1 and image.shape[1] == 16


def test_without_timm(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'timm.data', None)
    with pytest.raises(ValueError, match='pip install --no-deps timm'):
        TimmDataset(_Files(tmp_path / 'x'), 16, is_training=True)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--images', '0'], ['--images', 'got 0']),
        (['--model-speed', '-1'], ['--model-speed', 'got -1']),
        (['--synthetic', '--images', '2', '--against', 'timm'], ['mmseg', '--against']),
        (['--cfg-options', 'train_dataloader=None'], ['train_dataloader']),
    ],
)
def test_errors(call_tool, tmp_path, arguments, words):
    result = call_tool(TOOL, NANO[SEG], '--out', tmp_path, *arguments, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert all(word in result.stderr for word in words), result.stderr
