# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The configs that the pages in docs/ show, each under the path in its first line."""

import re
import shutil
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mlla_mm.engine.parts import datasets_of, kind_of, parts_of

from ..processes import ROOT

EXAMPLES = {
    path: f'# {path}\n{code}'
    for page in sorted(ROOT.glob('docs/*.md'))
    for path, code in re.findall(
        r'^```python\n# (configs/\S+\.py)\n(.*?)^```', page.read_text(), re.M | re.S
    )
}
#: The modules that pages show, each under its name in the first line.
MODULES = {
    name: f'# {name}\n{code}'
    for page in sorted(ROOT.glob('docs/*.md'))
    for name, code in re.findall(
        r'^```python\n# (\w+\.py)\n(.*?)^```', page.read_text(), re.M | re.S
    )
}
# In a clone of mmdetection.
CLONE = 'configs/mlla/retinanet_mlla-t_fpn_1x_coco.py'
RELIABLE = 'configs/mlla/retinanet_mlla-t_fpn_1x_coco_reliable.py'


def copy_configs(root: Path) -> None:
    """Our configs in a folder and, beside them, configs and modules of the pages."""
    shutil.copytree(ROOT / 'configs', root / 'configs')
    for path, code in EXAMPLES.items():
        if path not in (CLONE, RELIABLE):
            assert not (root / path).exists(), path
            (root / path).write_text(code)
    for name, code in MODULES.items():
        (root / name).write_text(code)


def clone_mmdetection(root: Path, theirs: Path) -> None:
    """mmdet's RetinaNet in a folder and, beside it, the configs that inherit from it.

    Args:
        root (Path): The folder.
        theirs (Path): The configs of mmdet.
    """
    (root / 'configs').mkdir(parents=True)
    for folder in ('_base_', 'retinanet'):
        (root / 'configs' / folder).symlink_to(theirs / folder)
    (root / CLONE).parent.mkdir()
    for path in (CLONE, RELIABLE):
        (root / path).write_text(EXAMPLES[path])


def small(steps: Any) -> None:
    """Shrink the images of a pipeline, in place."""
    if isinstance(steps, list):
        for step in steps:
            small(step)
        return
    sizes = dict(
        RandomChoiceResize=dict(scales=[(96, 64)]),
        RandomResize=dict(scale=(96, 64)),
        Resize=dict(scale=(96, 64)),
        RandomCrop=dict(crop_size=(32, 48)),
        RandomResizedCrop=dict(scale=32),
        ResizeEdge=dict(scale=36),
        CenterCrop=dict(crop_size=32),
    )
    kind = kind_of(steps)
    assert kind in sizes or 'scale' not in steps
    steps.update(sizes.get(kind, {}))
    for nested in steps.get('transforms', []):
        small(nested)


def shorten(cfg: Config) -> None:
    """Two updates of two images a process, in place; no validation, no checkpoint."""
    cfg.load_from = None
    for part in parts_of(cfg.model):
        if part.get('init_cfg') and 'Pretrained' in str(part['init_cfg']):
            part['init_cfg'] = None
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False, batch_size=2)
    for part in parts_of(loader.dataset):
        if 'pipeline' in part:
            small(part['pipeline'])
    for _, dataset in datasets_of(cfg, 'train'):
        dataset['indices'] = 8
    if cfg.model.data_preprocessor.get('size'):
        cfg.model.data_preprocessor.size = (32, 48)
    if 'rcnn' in (cfg.model.get('train_cfg') or {}):
        cfg.model.train_cfg.rcnn.sampler.num = 64
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.max_iters = 2
    else:
        cfg.train_cfg.max_epochs = 1
    if cfg.optim_wrapper.type == 'AmpOptimWrapper':  # needs a GPU
        cfg.optim_wrapper.type = 'OptimWrapper'
        cfg.optim_wrapper.pop('loss_scale')
    for split in ('val', 'test'):
        cfg.update({f'{split}_{x}': None for x in ('cfg', 'dataloader', 'evaluator')})
    cfg.default_hooks.checkpoint = dict(type='NoHook')
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.allow_empty_classes = True
