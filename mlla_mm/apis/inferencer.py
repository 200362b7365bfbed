# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Predictions on pictures, folders and videos, drawn and as plain data."""

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS, VISUALIZERS, DefaultScope
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from rich.progress import track

from ..engine.arguments import named_arguments
from ..engine.config_files import read_config
from ..engine.parts import kind_of
from ..utils.allocator import keep_freed_memory
from ..utils.text import describe_error
from .inputs import InputType, Picture, count_pictures, find_sources, read_pictures
from .model import load_model
from .output import Output
from .tasks import TASKS, Task
from .test_data import classes_and_palette, test_datasets, test_pipeline

# A picture, and what the test pipeline makes of it: None if there is an error.
_Item = Tuple[Picture, Optional[Dict[str, Any]]]


class Inferencer:
    """Detection, segmentation or classification on pictures, with one interface.

    The inferencers of mmdet, mmseg and mmpretrain do less in these points:

    - A picture that cannot be read or predicted is reported, and the others go on.
    - Weights that do not fit the model are an error.
    - Arrays are BGR in every task.
    - Videos are read and written.
    - Pictures are read, predicted, drawn and written one batch at a time.

    Pictures are prepared as for the config's test, or without one for its validation.

    Args:
        config (str | Path | Config): A config of this package, or one of mmdet, mmseg
            or mmpretrain with MLLA as the backbone.
        checkpoint (str | Path): The authors' file or ours, local or an http(s) address.
            Or an ONNX file of a whole model from ``tools/export.py``.
        device (str, optional): Such as 'cpu' or 'cuda:1'. None takes a GPU if there is
            one. Defaults to None.
        ema (bool, optional): True takes the checkpoint's averaged weights, False the
            plain ones. None takes the average of MMEngine's EMAHook, as MMEngine does,
            and the plain ones of other files. Defaults to None.
        trust_checkpoint (bool): Let the checkpoint run the code that it may contain, as
            ``trust_checkpoint`` in a config does. Defaults to False.
        fuse_conv_bn (bool): Fold every BatchNorm into the convolution before it.
            Defaults to False.
        show_progress (bool): Show a progress bar in a terminal. Defaults to True.
        cuda_graph (bool): Replay the backbone as a CUDA graph, one for each size and
            number of pictures at the network's input. It is for pictures of few sizes,
            see :class:`mlla_mm.engine.cuda_graph.GraphedForward`. Defaults to False.

    Attributes:
        model (nn.Module): The model in evaluation mode.
        classes (Sequence[str]): Class names from the checkpoint. A checkpoint without
            class names, such as the authors', takes those of the config's test dataset.
        visualizer (Visualizer): What draws the predictions.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ValueError: If the config has no known task, no test data or no class names, if
            its test data sets have several pipelines, if the weights do not fit the
            model, or if ``cuda_graph`` meets another device than CUDA.

    Examples:
        >>> from mlla_mm.apis import Inferencer
        >>> inferencer = Inferencer(
        ...     'configs/detection/mask-rcnn_mlla-t_fpn_1x_coco.py', 'mask_rcnn.pth')
        >>> inferencer('photo.jpg', out_dir='out')[0]['instances'][0]
        {'label': 0, 'name': 'person', 'box': [50.1, ...], 'score': 0.99, 'mask': ...}
    """

    def __init__(
        self,
        config: Union[str, Path, Config],
        checkpoint: Union[str, Path],
        device: Optional[str] = None,
        ema: Optional[bool] = None,
        trust_checkpoint: bool = False,
        fuse_conv_bn: bool = False,
        show_progress: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        cfg = config if isinstance(config, Config) else read_config(str(config))
        self._scope = cfg.get('default_scope')
        if self._scope not in TASKS:
            raise ValueError(
                f"The config's default_scope must be one of {list(TASKS)}, got "
                f'{self._scope}.'
            )
        keep_freed_memory()
        self._show_progress = show_progress
        datasets = test_datasets(cfg)
        first, *others = test_pipeline(datasets) or [dict(type='none')]
        if kind_of(first) != 'LoadImageFromFile':
            raise ValueError(
                'The test pipeline must begin with LoadImageFromFile, got '
                f'{kind_of(first)}.'
            )
        self.model = load_model(
            cfg, checkpoint, device, ema, trust_checkpoint, fuse_conv_bn, cuda_graph
        )
        scope = DefaultScope.overwrite_default_scope(self._scope)
        with named_arguments(cfg), scope:
            self._loader = TRANSFORMS.build(first)
            self._pipeline = Compose(others)
            (_, dataset), *_ = datasets
            self.classes, palette = classes_and_palette(
                dataset, self.model.dataset_meta
            )
            self.visualizer = _build_visualizer(cfg)
        self.visualizer.dataset_meta = dict(classes=self.classes, palette=palette)

    def __call__(
        self,
        inputs: Union[InputType, Sequence[InputType]],
        out_dir: Optional[Union[str, Path]] = None,
        batch_size: int = 1,
        score_thr: float = 0.3,
        top_k: int = 5,
    ) -> List[Dict[str, Any]]:
        """Predict. If there is an ``out_dir``, also draw and write.

        Args:
            inputs (str | Path | np.ndarray | Sequence): A picture, a video, a folder
                with all folders below it, a BGR array (H, W, 3) of type uint8, or a
                sequence of them.
            out_dir (str | Path, optional): Folder for ``results.json``, for drawn
                pictures and videos (``drawn/``), and for the label maps of segmentation
                (``label_maps/``). Files are named like the inputs. None writes nothing.
                Defaults to None.
            batch_size (int): Largest number of pictures that are predicted together.
                They must have the same size at the network's input: attention is
                global, so padding would change the features. Defaults to 1.
            score_thr (float): Only detections with a higher score are drawn and
                returned. Defaults to 0.3.
            top_k (int): Number of classes in the result of a classification.
                Defaults to 5.

        Returns:
            list[dict]: A result for every picture and frame, in the order of the
            inputs. It is plain data for a JSON file:

            - ``input`` (str | int): The path, or the position of an array in
              ``inputs``.
            - ``frame`` (int): The position in a video, from 0.
            - ``error`` (str): Why the picture could not be read, predicted, drawn or
              written, such as 'is empty'. Entries of later steps are then missing.
            - ``task`` (str), ``height``, ``width`` (int): In pixels.
            - 'detection': ``instances``, a list of ``label`` (int), ``name`` (str),
              ``box`` ([x1, y1, x2, y2] in pixels), ``score`` (float) and, if the model
              predicts masks, ``mask`` (COCO's run-length encoding).
            - 'segmentation': ``classes``, the largest first, a list of ``label``,
              ``name`` and ``share`` of the pixels. With an ``out_dir`` also
              ``label_map``, the path of a PNG file whose pixels are labels.
            - 'classification': ``classes``, the best first, a list of ``label``,
              ``name`` and ``score``.
            - ``drawn`` (str): With an ``out_dir``, the drawn picture or video.

        Raises:
            TypeError: If an input is neither a path nor an array.
            ValueError: If ``batch_size`` or ``top_k`` is not positive, or if an array
                is not a BGR picture.
        """
        for name, value in dict(batch_size=batch_size, top_k=top_k).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}.')
        task = TASKS[self._scope](self.classes, score_thr, top_k)
        sources = find_sources(inputs, leave_out=out_dir)
        pictures = track(
            read_pictures(sources, self._load),
            description='Inference',
            total=count_pictures(sources),
            disable=not (self._show_progress and sys.stdout.isatty()),
        )
        results: List[Dict[str, Any]] = []
        out = None if out_dir is None else Output(out_dir)
        try:
            for batch in self._batches(pictures, batch_size):
                for picture, sample in self._predict(batch):
                    results.append(self._result(picture, sample, task, out))
        finally:  # also if the run is interrupted
            if out is not None:
                out.finish(results)
        return results

    def _load(self, path: str) -> np.ndarray:
        return self._loader(dict(img_path=path))['img']

    def _batches(
        self, pictures: Iterable[Picture], batch_size: int
    ) -> Iterator[List[_Item]]:
        """Run the test pipeline, and yield pictures of one size, or with errors."""
        items = map(self._prepare, pictures)
        for _, same_size in groupby(items, _size_at_input):
            while batch := list(islice(same_size, batch_size)):
                yield batch

    def _prepare(self, picture: Picture) -> _Item:
        if picture.image is None:
            return picture, None
        shape = picture.image.shape[:2]
        inputs = dict(
            img=picture.image,
            img_shape=shape,
            ori_shape=shape,
            # mmdet's PackDetInputs asks for these two.
            img_path=str(picture.source.label),
            img_id=0,
        )
        try:
            return picture, self._pipeline(inputs)
        except Exception as error:
            return _failed(picture, error), None

    @torch.no_grad()
    def _predict(
        self, batch: List[_Item]
    ) -> List[Tuple[Picture, Optional[BaseDataElement]]]:
        """Predict a batch. If that fails, predict its pictures one by one."""
        inputs = [data for _, data in batch if data is not None]
        if not inputs:
            return [(picture, None) for picture, _ in batch]
        try:
            samples = self.model.test_step(pseudo_collate(inputs))
            return [(item[0], sample.cpu()) for item, sample in zip(batch, samples)]
        except Exception as error:
            failed = _failed(batch[0][0], error)
        # Outside of `except`, because the error holds memory that may be scarce.
        if len(batch) == 1:
            return [(failed, None)]
        return [pair for item in batch for pair in self._predict([item])]

    def _result(
        self,
        picture: Picture,
        sample: Optional[BaseDataElement],
        task: Task,
        out: Optional[Output],
    ) -> Dict[str, Any]:
        """Describe a prediction, and draw and write it if there is an output."""
        result: Dict[str, Any] = dict(input=picture.source.label)
        if picture.frame is not None:
            result['frame'] = picture.frame
        if picture.image is None or sample is None:
            return dict(result, error=picture.error)
        result['height'], result['width'] = picture.image.shape[:2]
        result.update(task=task.name, **task.describe(sample))
        if out is None:
            return result
        try:
            labels = task.label_map(sample)
            if labels is not None:
                result['label_map'] = out.write_label_map(picture, labels)
            drawn = task.draw(self.visualizer, mmcv.bgr2rgb(picture.image), sample)
            result['drawn'] = out.write_drawn(picture, drawn)
        except Exception as error:
            result['error'] = f'cannot be drawn or written ({describe_error(error)})'
        return result


def _size_at_input(item: _Item) -> Optional[Tuple[int, ...]]:
    _, data = item
    return None if data is None else tuple(data['inputs'].shape)


def _failed(picture: Picture, error: Exception) -> Picture:
    """The picture when its test pipeline or its prediction has raised an error."""
    assert picture.image is not None
    height, width = picture.image.shape[:2]
    problem = (
        f'cannot be processed, at {width} x {height} pixels ({describe_error(error)})'
    )
    return picture._replace(image=None, error=problem)


def _build_visualizer(cfg: Config) -> Visualizer:
    """The config's visualizer, which only draws: it has no backends that write.

    It is not built by the registry, whose visualizers are shared by their names.
    """
    options = dict(cfg.get('visualizer') or {})
    kind = options.pop('type', 'Visualizer')
    if kind_of(dict(type=kind)) == 'Visualizer':  # MMEngine's, of no task
        kind = TASKS[cfg.default_scope].visualizer
    for key in ('name', 'vis_backends', 'save_dir'):
        options.pop(key, None)
    with VISUALIZERS.switch_scope_and_registry(cfg.default_scope) as registry:
        return (registry.get(kind) if isinstance(kind, str) else kind)(**options)
