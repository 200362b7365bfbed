# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What is published of COCO, ADE20K and ImageNet, to check a copy of them."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Union

from mmengine.config import Config

from ..evaluation.published import REPOSITORY
from .data import check_splits
from .source import PIXELS, Finding


class PublishedData(NamedTuple):
    """A published data set.

    Attributes:
        config (str): Its config in ``configs/_base_/datasets``.
        scope (str): The package that reads it.
        num_images (dict[str, int]): Number of images for training and validation.
        source (str): How to get it. ``{root}`` is the folder of the copy.
    """

    config: str
    scope: str
    num_images: Dict[str, int]
    source: str


_COCO = 'http://images.cocodataset.org'
_ADE20K = 'http://data.csail.mit.edu/places/ADEchallenge'
#: Published data sets by name.
PUBLISHED: Dict[str, PublishedData] = {
    'coco': PublishedData(
        'coco_instance.py',
        'mmdet',
        dict(train=118287, val=5000),
        f'Download {_COCO}/zips/train2017.zip, {_COCO}/zips/val2017.zip or, for '
        f'annotations, {_COCO}/annotations/annotations_trainval2017.zip, and unzip it '
        'in {root}.',
    ),
    'ade20k': PublishedData(
        'ade20k.py',
        'mmseg',
        dict(train=20210, val=2000),
        f'Download {_ADE20K}/ADEChallengeData2016.zip and unzip it in {{root.parent}}.',
    ),
    'imagenet': PublishedData(
        'imagenet.py',
        'mmpretrain',
        dict(train=1281167, val=50000),
        'Extract ILSVRC2012 from https://image-net.org to {root}/train/CLASS/IMAGE and '
        '{root}/val/CLASS/IMAGE: the usual valprep.sh moves the images of val into '
        'class folders. Lists in {root}/meta may be removed.',
    ),
}


def check_published(
    name: str, root: Union[str, Path], look: str = PIXELS
) -> List[Finding]:
    """Check a copy of a published data set: our config of it, and the published counts.

    What is wrong with the published data themselves, such as boxes of no size in COCO,
    is left out.

    Args:
        name (str): 'coco', 'ade20k' or 'imagenet'.
        root (str | Path): The folder of the copy, as ``data_root`` in our configs.
        look (str): How closely to look, one of :data:`mlla_mm.checks.source.LOOKS`.
            Defaults to 'pixels'.

    Returns:
        list[Finding]: What is wrong, with how to get the data as the way out; empty if
        nothing is wrong.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the package that reads the data set is not installed.
    """
    published, root = PUBLISHED[name], Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f'Folder not found: {root}. Give the folder that holds the data set.'
        )
    if find_spec(published.scope) is None:
        raise ValueError(
            f'The check of {name} needs {published.scope}, which is not installed: see '
            'docs/installation.md.'
        )
    cfg = Config.fromfile(
        REPOSITORY / 'configs' / '_base_' / 'datasets' / published.config
    )
    cfg.default_scope = published.scope
    ours = cfg.train_dataloader.dataset.data_root
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(root)
    if cfg.val_evaluator.get('ann_file'):
        ann_file = os.path.relpath(cfg.val_evaluator.ann_file, ours)
        cfg.val_evaluator.ann_file = str(root / ann_file)
    findings = check_splits(cfg, look, published.num_images).findings
    fix = published.source.format(root=root)
    return [finding._replace(fix=fix) for finding in findings if finding.fatal]
