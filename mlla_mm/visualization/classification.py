# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Classified pictures with their true and predicted classes."""

import math
import textwrap
from pathlib import Path
from typing import Union

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..utils.images import read_image
from .sheet import errors_of_predictions, load_predictions, save_figure, spread


def classification_sheet(
    cfg: Config,
    predictions: Union[str, Path],
    out: Union[str, Path],
    metrics: str,
    num_images: int = 24,
    columns: int = 8,
) -> None:
    """Save a sheet of pictures, each under its predicted and its true class.

    Args:
        cfg (Config): Config of the classifier; its test set is drawn.
        predictions (str | Path): What `tools/test.py --out` wrote.
        out (str | Path): Picture file to write.
        metrics (str): What the test measured, for the title.
        num_images (int): Number of images, spread over the test set. Defaults to 24.
        columns (int): Pictures per row. Defaults to 8.
    """
    from matplotlib.figure import Figure

    init_default_scope('mmpretrain')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes = dataset.CLASSES
    results = load_predictions(predictions, dataset)
    chosen = [results[i] for i in spread(len(results), num_images)]
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(
        figsize=(1.6 * columns, 1.95 * rows + 0.4), dpi=150, layout='constrained'
    )
    figure.suptitle(
        f'{metrics} on {len(results)} validation images; wrong predictions are red'
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis('off')
    for ax, result in zip(axes, chosen):
        with errors_of_predictions(predictions):
            predicted, true = int(result['pred_label']), int(result['gt_label'])
            score = float(result['pred_score'].max())
            lines = (
                f'ground truth: {classes[true]}',
                f'prediction: {classes[predicted]} ({score:.2f})',
            )
        ax.set_title(
            # Names may be longer than a picture is wide.
            '\n'.join(textwrap.fill(line, 24) for line in lines),
            fontsize=9,
            color='black' if predicted == true else 'red',
        )
        ax.imshow(read_image(result['img_path'], channel_order='rgb'))
    save_figure(figure, out)
