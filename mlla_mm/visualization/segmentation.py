# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Segmentation beside ground truth."""

from pathlib import Path
from typing import Union

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..utils.images import read_image
from .sheet import add_legend, draw_classes, new_sheet, save_sheet, show, spread


def segmentation_sheet(
    cfg: Config,
    predictions: Union[str, Path],
    out: Union[str, Path],
    metrics: str,
    num_images: int = 6,
) -> None:
    """Save a sheet of predicted label maps beside ground truth, over the pictures.

    Args:
        cfg (Config): Config of the segmentor; its test set is drawn.
        predictions (str | Path): Folder that `tools/test.py --out` wrote.
        out (str | Path): Picture file to write.
        metrics (str): What the test measured, for the title.
        num_images (int): Number of images, spread over the test set. Defaults to 6.
    """
    init_default_scope('mmseg')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    # Label maps in files count from 1 where 0 means unlabelled.
    offset = int(dataset.reduce_zero_label)
    chosen = spread(len(dataset), num_images)
    figure, axes = new_sheet(
        len(chosen),
        ('image', 'ground truth', 'prediction'),
        f'{metrics} on {len(dataset)} validation images',
    )
    seen = set()
    for panels, i in zip(axes, chosen):
        info = dataset.get_data_info(i)
        image = read_image(info['img_path'], channel_order='rgb')
        name = f'{Path(info["img_path"]).stem}.png'
        for ax in panels:
            show(ax, image)
        for ax, path in zip(
            panels[1:], (info['seg_map_path'], Path(predictions) / name)
        ):
            labels = read_image(str(path), 'unchanged').astype(int) - offset
            if labels.shape != image.shape[:2]:
                raise ValueError(
                    f'{path} is of {labels.shape}, and its image of {image.shape[:2]} '
                    'pixels: it is no label map of it.'
                )
            seen |= draw_classes(ax, labels, dataset.metainfo)
    add_legend(figure, dataset.metainfo, seen)
    save_sheet(figure, out)
