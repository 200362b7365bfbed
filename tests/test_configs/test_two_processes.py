# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Every config, and every one that the pages show, makes two updates on two processes.

tools/train.py runs the whole models on small digits, in the layout of the data that the
config names.
"""

import json
import math
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config

from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet

from ..nano import NANO
from ..processes import ROOT, run_tool
from .examples import (
    CLONE,
    EXAMPLES,
    RELIABLE,
    clone_mmdetection,
    copy_configs,
    shorten,
)

mmdet = pytest.importorskip('mmdet')
for package in ('mmseg', 'mmpretrain'):
    pytest.importorskip(package)

CONFIGS = sorted(
    {
        *(
            str(path.relative_to(ROOT))
            for path in ROOT.glob('configs/*/*.py')
            if path.parent.name != '_base_'
        ),
        *EXAMPLES,
    }
)
IN_CLONE = (CLONE, RELIABLE)


@pytest.fixture(scope='module')
def roots(once):
    """Our configs, and a clone of mmdetection, each with all data that configs name."""

    def fill(folder):
        copy_configs(folder / 'ours')
        theirs = Path(mmdet.__file__).parent / '.mim' / 'configs'
        if theirs.is_dir():
            clone_mmdetection(folder / 'clone', theirs)
        data = folder / 'ours' / 'data'
        for name in ('digits_coco', 'my_objects', 'more_objects'):
            make_coco(data / name, train=16, val=2, size=64)
        coco = make_coco(data / 'coco', train=16, val=2, size=64)
        for split in ('train', 'val'):
            (coco / f'{split}2017').symlink_to(split)
            annotations = coco / 'annotations' / f'instances_{split}.json'
            annotations.with_name(f'instances_{split}2017.json').write_text(
                json.dumps(with_classes_of_coco(json.loads(annotations.read_text())))
            )
        for name in ('digits_ade20k', 'my_masks', 'ade/ADEChallengeData2016'):
            make_ade20k(data / name, train=8, val=2, size=64)
        for path in (data / 'ade').rglob('images/*/*.png'):
            cv2.imwrite(str(path.with_suffix('.jpg')), cv2.imread(str(path)))
            path.unlink()
        for name in ('digits_imagenet', 'my_images', 'imagenet'):
            make_imagenet(data / name, train=10, val=10, size=32)
        if theirs.is_dir():
            (folder / 'clone' / 'data').symlink_to(data)

    folder = once('two_processes', fill)
    return {False: folder / 'ours', True: folder / 'clone'}


def with_classes_of_coco(content: dict) -> dict:
    """Digits as the first of COCO's classes."""
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO['classes']
    ids = [category['id'] for category in content['categories']]
    ids += range(max(ids) + 1, max(ids) + 1 + len(names) - len(ids))
    content['categories'] = [dict(id=i, name=name) for i, name in zip(ids, names)]
    return content


def train(cfg: Config, folder: Path, cwd: Path = ROOT) -> None:
    """Train on two processes, and look at what both have done."""
    cfg.custom_imports.imports.append('tests.update_counter')
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='UpdateCounter')]
    cfg.dump(folder / 'config.py')
    run_tool(
        'python', ROOT / 'tools' / 'train.py', folder / 'config.py',
        '--work-dir', folder / 'work', '--launcher', 'pytorch', processes=2, cwd=cwd,
    )  # fmt: skip
    first, second = (
        json.loads((folder / 'work' / f'updates_{rank}.json').read_text())
        for rank in range(2)
    )
    assert first['weights'] == second['weights']
    assert len({*first['weights']}) == 2
    assert first['updates'] == second['updates'] >= 2
    # Each process has images of its own.
    assert first['losses'] != second['losses']
    assert all(map(math.isfinite, first['losses'] + second['losses']))


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS)
def test_two_updates(roots, tmp_path, path, monkeypatch):
    root = roots[path in IN_CLONE]
    monkeypatch.syspath_prepend(root)  # as the tools do, for modules of the pages
    if not root.is_dir():
        pytest.skip('mmdet is installed without its configs')
    cfg = Config.fromfile(root / path)
    shorten(cfg)
    train(cfg, tmp_path, root)


@pytest.mark.parametrize(
    'backbone',
    [
        {},
        dict(
            type='LinearAttentionSwin',
            token_mixer=dict(input_gate=True, forget_gate=True, shortcut=True),
        ),
    ],
)
def test_two_updates_of_a_small_model(roots, tmp_path, backbone):
    """The head reads the last of four outputs."""
    cfg = Config.fromfile(roots[False] / 'configs/segmentation/my_fcn.py')
    shorten(cfg)
    cfg.model.backbone.arch = Config.fromfile(NANO['mmseg']).model.backbone.arch
    cfg.model.decode_head.update(in_channels=256, in_index=3)
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    cfg.model.backbone.update(backbone)
    train(cfg, tmp_path, roots[False])
