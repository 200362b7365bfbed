# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Predictions beside ground truth, for each of the three tasks."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple, Union

import numpy as np
from matplotlib.figure import Figure

from ..utils.images import read_image
from ..utils.text import describe_error, printable
from .sheet import (
    add_legend,
    class_colors,
    draw_classes,
    draw_instances,
    new_sheet,
    save_figure,
    save_sheet,
    show,
    spread,
)


class PredictionsError(ValueError):
    """Predictions that are damaged, or of another config.

    The message has a verb, and no subject: the caller puts the name of the file first.
    """


def detection_sheet(
    dataset: Any,
    predictions: object,
    out: Union[str, Path],
    metrics: str,
    num_images: int = 6,
    score_thr: float = 0.5,
) -> None:
    """Save a sheet of detections beside ground truth.

    Args:
        dataset (BaseDetDataset): The test set.
        predictions (object): Content of the file that ``tools/test.py --out`` wrote.
        out (str | Path): Picture file to write.
        metrics (str): What the test measured, for the title.
        num_images (int): Number of images, spread over the test set. Defaults to 6.
        score_thr (float): Detections of higher scores are drawn. Defaults to 0.5.

    Raises:
        PredictionsError: If these are no predictions for the test set.
        ValueError: If a mask of the test set does not fit its image.
    """
    classes, colors = dataset.metainfo['classes'], class_colors(dataset.metainfo)
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    # Data sets in a wrapper may have the same numbers of images.
    instances = {info['img_path']: info['instances'] for info in infos}
    results = _checked(predictions, dataset)
    chosen = [results[i] for i in spread(len(results), num_images)]
    figure, axes = new_sheet(
        len(chosen),
        ('image', 'ground truth', f'prediction, score > {score_thr:g}'),
        f'{metrics} on {len(results)} validation images',
    )
    for panels, result in zip(axes, chosen):
        image = read_image(result['img_path'], channel_order='rgb')
        shape = image.shape[:2]
        for ax in panels:
            show(ax, image)
        with _errors_of_predictions():
            truth = instances[result['img_path']]
            found = result['pred_instances']
            # mmdet finds 100 instances in an image at most.
            kept = np.flatnonzero(found['scores'] > score_thr)[:100]
            labels = found['labels'][kept].tolist()
            scores = found['scores'][kept].tolist()
            draw_instances(
                panels[2],
                found['bboxes'][kept].tolist(),
                [f'{classes[label]} {p:.2f}' for label, p in zip(labels, scores)],
                [colors[label] for label in labels],
                _decode([found['masks'][i] for i in kept], shape),
            )
        labels = [instance['bbox_label'] for instance in truth]
        draw_instances(
            panels[1],
            [instance['bbox'] for instance in truth],
            [classes[label] for label in labels],
            [colors[label] for label in labels],
            _decode([instance['mask'] for instance in truth], shape),
        )
    save_sheet(figure, out)


def segmentation_sheet(
    dataset: Any,
    predictions: Path,
    out: Union[str, Path],
    metrics: str,
    num_images: int = 6,
) -> None:
    """Save a sheet of predicted label maps beside ground truth, over the pictures.

    Args:
        dataset (BaseSegDataset): The test set.
        predictions (Path): The folder that ``tools/test.py --out`` wrote.
        out (str | Path): Picture file to write.
        metrics (str): What the test measured, for the title.
        num_images (int): Number of images, spread over the test set. Defaults to 6.

    Raises:
        ValueError: If a label map is not of the size of its image.
    """
    chosen = spread(len(dataset), num_images)
    figure, axes = new_sheet(
        len(chosen),
        ('image', 'ground truth', 'prediction'),
        f'{metrics} on {len(dataset)} validation images',
    )
    seen: Set[int] = set()
    for panels, i in zip(axes, chosen):
        info = dataset.get_data_info(i)
        # With reduce_zero_label, 0 in a file means unlabelled, and classes begin at 1.
        offset = int(info['reduce_zero_label'])
        image = read_image(info['img_path'], channel_order='rgb')
        predicted = predictions / f'{Path(info["img_path"]).stem}.png'
        for ax, path in zip(panels, (None, info['seg_map_path'], predicted)):
            show(ax, image)
            if path is None:
                continue
            labels = read_image(str(path), 'unchanged').astype(int) - offset
            if labels.shape != image.shape[:2]:
                raise ValueError(
                    f'{path} is of {labels.shape}, and its image of {image.shape[:2]} '
                    'pixels: it is no label map of it.'
                )
            seen |= draw_classes(ax, labels, dataset.metainfo)
    add_legend(figure, dataset.metainfo, seen)
    save_sheet(figure, out)


def classification_sheet(
    dataset: Any,
    predictions: object,
    out: Union[str, Path],
    metrics: str,
    num_images: int = 24,
    columns: int = 8,
) -> None:
    """Save a sheet of pictures, each under its predicted and its true class.

    Args:
        dataset (BaseDataset): The test set.
        predictions (object): Content of the file that ``tools/test.py --out`` wrote.
        out (str | Path): Picture file to write.
        metrics (str): What the test measured, for the title.
        num_images (int): Number of images, spread over the test set. Defaults to 24.
        columns (int): Pictures per row. Defaults to 8.

    Raises:
        PredictionsError: If these are no predictions for the test set.
    """
    classes = dataset.metainfo.get('classes')
    results = _checked(predictions, dataset)
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
        with _errors_of_predictions():
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


def _checked(predictions: object, dataset: Any) -> List[Dict[str, Any]]:
    """The predictions, if all are for images of the data set.

    No other image is opened, whatever the predictions name.
    """
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    images = {info['img_path'] for info in infos}
    results: List[Any] = predictions if isinstance(predictions, list) else [predictions]
    for result in results or [None]:
        image = result.get('img_path') if isinstance(result, dict) else result
        if not isinstance(image, str) or image not in images:
            raise PredictionsError(
                'holds no predictions for the test data of the config: instead of an '
                f'image of these it has {printable(image)}'
            )
    return results


@contextmanager
def _errors_of_predictions() -> Iterator[None]:
    """Turn the errors of missing or wrong values into :class:`PredictionsError`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PredictionsError(
            f'holds no predictions of the config ({describe_error(error)})'
        ) from error


def _decode(masks: Sequence[dict], shape: Tuple[int, int]) -> List[np.ndarray]:
    """Run-length encoded masks to (H, W), bool."""
    from pycocotools import mask as mask_utils

    for mask in masks:
        # Huge masks crash pycocotools.
        if tuple(mask['size']) != shape:
            raise ValueError(
                'A mask is of another size than its image, (height, width) = '
                f'{tuple(map(printable, mask["size"]))} instead of {shape}.'
            )
    decoded = [mask_utils.decode(mask) for mask in masks]
    # pycocotools does not set the pixels after the last run.
    if any(mask.max(initial=0) > 1 for mask in decoded):
        raise ValueError('A mask does not fill its image.')
    return [mask.astype(bool) for mask in decoded]
