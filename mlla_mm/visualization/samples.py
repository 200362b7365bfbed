# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Training samples as the model gets them, with their labels."""

import textwrap
from pathlib import Path
from typing import Set, Union

import numpy as np
import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..datasets.corrupt_images import CheckedDataset
from ..models.erasing import erase
from ..utils.images import read_image
from .sheet import (
    add_legend,
    class_colors,
    draw_classes,
    draw_instances,
    new_sheet,
    save_sheet,
    show,
    spread,
)


def training_sheet(
    cfg: Config, out: Union[str, Path], num_images: int = 8, repeat: bool = False
) -> None:
    """Save a sheet of training pictures: as stored, and augmented with labels.

    The sheet shows what the data set's pipeline makes, and erased boxes. It does not
    show what else the data preprocessor does with a batch afterwards: normalisation,
    padding, Mixup and CutMix.

    Args:
        cfg (Config): Config of any of the three tasks; its training set is drawn.
        out (str | Path): Picture file to write.
        num_images (int): Number of samples. Defaults to 8.
        repeat (bool): Draw the first sample again and again, instead of samples spread
            over the data set. Defaults to False.

    Raises:
        ValueError: If the config's task is not one of the three or it has no training
            data, or if ``num_images`` is less than 1.
    """
    if cfg.get('default_scope') not in _DRAWERS:
        raise ValueError(
            f'default_scope must be one of {list(_DRAWERS)}, got '
            f'{cfg.get("default_scope")!r}.'
        )
    if num_images < 1:
        raise ValueError(f'The number of images must be at least 1, got {num_images}.')
    if cfg.get('train_dataloader') is None:
        raise ValueError('The config has no train_dataloader, whose data are drawn.')
    init_default_scope(cfg.default_scope)
    dataset = CheckedDataset(cfg.train_dataloader.dataset)
    draw = _DRAWERS[cfg.default_scope]
    positions = [0] * num_images if repeat else spread(len(dataset), num_images)
    figure, axes = new_sheet(len(positions), ('as stored', 'augmented, with labels'))
    seen: Set[int] = set()
    for (left, right), i in zip(axes, positions):
        packed = dataset[i]
        sample = packed['data_samples']
        # Of a mix of images it is the first.
        show(left, read_image(sample.img_path, channel_order='rgb'))
        inputs = packed['inputs']
        if 'erasing' in sample:
            inputs = _erased(inputs, sample, cfg)
        # Inputs are (3, H, W), BGR, and of mixed images floats or large integers.
        inputs = inputs.numpy()[::-1].transpose(1, 2, 0)
        show(right, inputs.clip(0, 255).astype(np.uint8))
        seen |= draw(right, sample, dataset.metainfo)
    if seen:
        add_legend(figure, dataset.metainfo, seen)
    save_sheet(figure, out)


def _erased(inputs: Tensor, sample: BaseDataElement, cfg: Config) -> Tensor:
    """An image (3, H, W), BGR, with its erased box."""
    preprocessor = (cfg.get('model') or {}).get('data_preprocessor') or {}
    # RGB, as ``to_rgb`` of the preprocessor makes the image. Without them the model
    # does not normalise.
    mean, std = (
        torch.tensor((preprocessor.get(key) or [default])[::-1]).view(-1, 1, 1)
        for key, default in (('mean', 0.0), ('std', 1.0))
    )
    normalised = (inputs - mean) / std
    erase(normalised, *sample.erasing)
    return (normalised * std + mean).round()


def _draw_detection(ax: Axes, sample: BaseDataElement, metainfo: dict) -> Set[int]:
    from mmdet.models.utils import mask2ndarray

    instances = sample.gt_instances
    colors = class_colors(metainfo)
    labels = instances.labels.tolist()
    draw_instances(
        ax,
        instances.bboxes.tensor.tolist(),
        [metainfo['classes'][label] for label in labels],
        [colors[label] for label in labels],
        mask2ndarray(instances.masks).astype(bool) if 'masks' in instances else None,
    )
    return set()


def _draw_segmentation(ax: Axes, sample: BaseDataElement, metainfo: dict) -> Set[int]:
    return draw_classes(ax, sample.gt_sem_seg.data[0].numpy(), metainfo)


def _draw_classification(ax: Axes, sample: BaseDataElement, metainfo: dict) -> Set[int]:
    classes = metainfo.get('classes')
    labels = sample.gt_label.tolist()
    names = ', '.join(str(classes[i] if classes else i) for i in labels)
    ax.text(
        0.03,
        0.97,
        textwrap.fill(names, 24),
        transform=ax.transAxes,
        verticalalignment='top',
        fontsize=9,
        bbox=dict(boxstyle='square,pad=0.2', facecolor='white', edgecolor='none'),
    )
    return set()


# They draw the labels of a sample, and return the classes for the legend.
_DRAWERS = {
    'mmdet': _draw_detection,
    'mmseg': _draw_segmentation,
    'mmpretrain': _draw_classification,
}
