# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Segmentation overlays beside ground truth."""

from pathlib import Path
from typing import Union

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from .sheet import enlarge, enlargement, save_sheet


def segmentation_sheet(
    cfg: Config,
    predictions: Union[str, Path],
    out: Union[str, Path],
    num_images: int = 8,
) -> None:
    """Save a sheet of predicted label maps beside ground truth, over the pictures.

    Args:
        cfg (Config): Config of the segmentor; its test set is drawn.
        predictions (str | Path): Folder that `tools/test.py --out` wrote.
        out (str | Path): Picture file to write.
        num_images (int): Number of images, spread over the test set. Defaults to 8.
    """
    init_default_scope('mmseg')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    palette = np.array(dataset.metainfo['palette'], dtype=np.float32)
    # Label maps in files count from 1 where 0 means unlabelled.
    offset = int(dataset.reduce_zero_label)
    pairs = []
    for i in np.linspace(0, len(dataset) - 1, num_images).astype(int):
        info = dataset.get_data_info(i)
        name = f'{Path(info["img_path"]).stem}.png'
        image = mmcv.imread(info['img_path'], channel_order='rgb')
        maps = (info['seg_map_path'], Path(predictions) / name)
        pairs.append(
            tuple(
                overlay(
                    image,
                    mmcv.imread(str(path), 'unchanged').astype(int) - offset,
                    palette,
                )
                for path in maps
            )
        )
    save_sheet(pairs, ('ground truth', 'prediction'), out)


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Blend the classes' colours into a picture; unlabelled pixels stay as they are."""
    known = (labels >= 0) & (labels < len(palette))
    colours = palette[np.where(known, labels, 0)]
    blended = np.where(known[..., None], (image + 2 * colours) / 3, image)
    blended = blended.astype(np.uint8)
    return enlarge(blended, enlargement(image.shape[:2]))
