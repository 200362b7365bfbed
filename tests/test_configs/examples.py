# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The configs that the pages in docs/ show, each under the path in its first line."""

import re
import shutil
from pathlib import Path
from typing import Any

from ..processes import ROOT

EXAMPLES = {
    path: f'# {path}\n{code}'
    for page in sorted(ROOT.glob('docs/*.md'))
    for path, code in re.findall(
        r'^```python\n# (configs/\S+\.py)\n(.*?)^```', page.read_text(), re.M | re.S
    )
}
# In a clone of mmdetection.
CLONE = 'configs/mlla/retinanet_mlla-t_fpn_1x_coco.py'
RELIABLE = 'configs/mlla/retinanet_mlla-t_fpn_1x_coco_reliable.py'


def copy_configs(root: Path) -> None:
    """Our configs in a folder and, beside them, those of the pages."""
    shutil.copytree(ROOT / 'configs', root / 'configs')
    for path, code in EXAMPLES.items():
        if path not in (CLONE, RELIABLE):
            assert not (root / path).exists(), path
            (root / path).write_text(code)


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
    assert steps['type'] in sizes or 'scale' not in steps
    steps.update(sizes.get(steps['type'], {}))
    for nested in steps.get('transforms', []):
        small(nested)
