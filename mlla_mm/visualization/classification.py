# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Classified pictures with their true and predicted classes."""

from pathlib import Path
from typing import Union

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import DATASETS, init_default_scope


def classification_sheet(
    cfg: Config,
    predictions: Union[str, Path],
    out: Union[str, Path],
    num_images: int = 24,
    columns: int = 8,
) -> None:
    """Save a sheet of pictures, each under its predicted class and score.

    Wrong predictions are red and name the true class.

    Args:
        cfg (Config): Config of the classifier; its test set is drawn.
        predictions (str | Path): What `tools/test.py --out` wrote.
        out (str | Path): Picture file to write.
        num_images (int): Number of images, spread over the test set. Defaults to 24.
        columns (int): Pictures per row. Defaults to 8.
    """
    from matplotlib.figure import Figure

    init_default_scope('mmpretrain')
    classes = DATASETS.build(cfg.test_dataloader.dataset).CLASSES
    results = load(predictions)
    rows = -(-num_images // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis('off')
    indices = np.linspace(0, len(results) - 1, num_images).astype(int)
    for ax, result in zip(axes, (results[i] for i in indices)):
        predicted, true = int(result['pred_label']), int(result['gt_label'])
        title = f'{classes[predicted]} ({float(result["pred_score"].max()):.2f})'
        if predicted != true:
            title += f', is {classes[true]}'
        ax.set_title(title, fontsize=9, color='black' if predicted == true else 'red')
        ax.imshow(mmcv.imread(result['img_path'], channel_order='rgb'))
    figure.savefig(out, dpi=120)
