# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a config says of the data of a test: how pictures are prepared, and classes."""

from collections.abc import Mapping
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS

from ..engine.parts import datasets_of, kind_of


def test_datasets(cfg: Config) -> List[Tuple[str, Any]]:
    """The data sets of the test, or without one those of the validation.

    Raises:
        ValueError: If the config has neither.
    """
    datasets = datasets_of(cfg, 'test') or datasets_of(cfg, 'val')
    if not datasets:
        raise ValueError(
            'Inference prepares pictures as a test does, but the config has no '
            'test_dataloader and no val_dataloader. Give it one of them.'
        )
    return datasets


def test_pipeline(datasets: List[Tuple[str, Any]]) -> List[Dict[str, Any]]:
    """The steps of the test pipeline, without those that load annotations.

    Raises:
        ValueError: If the data sets have several pipelines.
    """
    found = []
    for key, dataset in datasets:
        steps = dataset.get('pipeline') or ()
        found.append((key, [x for x in steps if 'Annotations' not in str(kind_of(x))]))
    for key, steps in found[1:]:
        if steps != found[0][1]:
            raise ValueError(
                f'{found[0][0]} and {key} have other pipelines. Give a config with the '
                'test data set whose pipeline is to be used.'
            )
    return found[0][1]


def classes_and_palette(
    test_dataset: Mapping[str, Any], saved: Mapping[str, Any]
) -> Tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Class names and their RGB colours: the checkpoint's, else the test dataset's.

    Args:
        test_dataset (Mapping): The config of a data set, whose scope is the default.
        saved (Mapping): What the checkpoint says of its data set.

    Raises:
        ValueError: If neither has class names.
    """
    dataset = DATASETS.build(dict(test_dataset, lazy_init=True)).metainfo
    classes = saved.get('classes') or dataset.get('classes')
    if not classes:
        raise ValueError(
            'Neither the checkpoint nor the test dataset of the config has class '
            'names. Set metainfo=dict(classes=...) in the test dataset.'
        )
    for meta in (saved, dataset):
        if len(meta.get('palette') or ()) >= len(classes):
            return classes, meta['palette']
    colours = np.random.default_rng(0).integers(0, 256, (len(classes), 3))
    return classes, colours.tolist()
