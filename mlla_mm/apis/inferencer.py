# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Predictions on pictures, folders and videos, drawn and as plain data."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.infer import BaseInferencer
from mmengine.registry import DATASETS, TRANSFORMS, VISUALIZERS, DefaultScope
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from rich.progress import track
from torch import nn

from ..engine.options import read_config
from ..utils.allocator import keep_freed_memory
from ..utils.text import describe_error
from .inputs import InputType, Picture, count_pictures, find_sources, read_pictures
from .model import load_model
from .output import Output
from .tasks import TASKS, Task

# A picture and what the test pipeline makes of it; None for one with an error.
_Item = Tuple[Picture, Optional[dict]]


class Inferencer(BaseInferencer):
    """Detection, segmentation or classification on pictures, with one interface.

    It is MMEngine's inferencer with the steps of all three tasks, and differs from
    those of mmdet, mmseg and mmpretrain in that a picture that cannot be read or
    predicted does not end the work on the others, weights that do not fit are an error,
    arrays are BGR throughout, and pictures are read, predicted, drawn and written one
    batch at a time.

    Args:
        config (str | Path | Config): A config of ours, or of mmdet, mmseg or mmpretrain
            with MLLA as the backbone.
        checkpoint (str | Path): The authors' file or ours.
        device (str, optional): Such as 'cpu' or 'cuda:1'. None takes a GPU if there is
            one. Defaults to None.
        ema (bool): Take the checkpoint's averaged weights. Defaults to False.
        trust_checkpoint (bool): Let the checkpoint run the code that it may carry, as
            the config's ``trust_checkpoint`` does. Defaults to False.
        fuse_conv_bn (bool): Fold every BatchNorm into the convolution before it.
            Defaults to False.
        show_progress (bool): Show a progress bar, in a terminal. Defaults to True.

    Attributes:
        model (nn.Module): The model in evaluation mode.
        classes (tuple[str]): Class names: the checkpoint's, else those of the config's
            test dataset (for published checkpoints: COCO's, ADE20K's or ImageNet's).

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ValueError: If the config is of no task, has no test pipeline or no class names,
            or if the weights do not fit.

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
        ema: bool = False,
        trust_checkpoint: bool = False,
        fuse_conv_bn: bool = False,
        show_progress: bool = True,
    ) -> None:
        if not isinstance(config, Config):
            config = read_config(str(config))
        scope = config.get('default_scope')
        if scope not in TASKS:
            raise ValueError(
                f"The config's default_scope must be one of {list(TASKS)}, got {scope}."
            )
        keep_freed_memory()
        self._loading = dict(
            ema=ema, trust_checkpoint=trust_checkpoint, fuse_conv_bn=fuse_conv_bn
        )
        with DefaultScope.overwrite_default_scope(scope):
            super().__init__(config, str(checkpoint), device, scope, show_progress)

    def __call__(
        self,
        inputs: Union[InputType, Sequence[InputType]],
        out_dir: Optional[Union[str, Path]] = None,
        batch_size: int = 1,
        score_thr: float = 0.3,
        top_k: int = 5,
    ) -> List[Dict[str, Any]]:
        """Predict, and with an ``out_dir`` draw and write.

        Args:
            inputs (str | Path | np.ndarray | Sequence): A picture, a video, a folder of
                them with all folders below it, a BGR array (H, W, 3) of uint8, or
                several of these.
            out_dir (str | Path, optional): Folder for ``results.json``, drawn pictures
                and videos (``drawn/``), and the label maps of segmentation
                (``label_maps/``), which have the names of the inputs. None writes
                nothing. Defaults to None.
            batch_size (int): Most pictures that are predicted together. Only pictures
                of the same size at the network's input are, since attention is global
                and padding would change the features. Defaults to 1.
            score_thr (float): Only detections with a score above it are drawn and
                returned. Defaults to 0.3.
            top_k (int): Number of classes in the result of a classification.
                Defaults to 5.

        Returns:
            list[dict]: A result for every picture and frame, ready for JSON, in the
            order of the inputs:

            - ``input`` (str | int): The path, or the position of an array in
              ``inputs``; ``frame`` (int): The position in a video, from 0.
            - ``error`` (str): Why it could not be read, predicted, drawn or written,
              such as 'is empty'; what comes after that step is not there.
            - ``task`` (str), ``height``, ``width`` (int): In pixels.
            - 'detection': ``instances``, a list of ``label`` (int), ``name`` (str),
              ``box`` ([x1, y1, x2, y2] in pixels), ``score`` (float) and, of models
              with masks, ``mask`` (COCO's run-length encoding).
            - 'segmentation': ``classes``, the largest first, a list of ``label``,
              ``name`` and ``share`` of the pixels; with an ``out_dir`` ``label_map``,
              the path of a PNG file whose pixels are labels.
            - 'classification': ``classes``, the best first, a list of ``label``,
              ``name`` and ``score``.
            - ``drawn`` (str): With an ``out_dir``, the drawn picture or video.

        Raises:
            TypeError: If an input is neither a path nor an array.
            ValueError: If ``batch_size`` or ``top_k`` is not positive, or if an array
                is no picture.
        """
        for name, value in dict(batch_size=batch_size, top_k=top_k).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}.')
        task = TASKS[self.scope](self.classes, score_thr, top_k)
        sources = find_sources(inputs, leave_out=out_dir)
        pictures = track(
            read_pictures(sources, self._load),
            description='Inference',
            total=count_pictures(sources),
            disable=not (self.show_progress and sys.stdout.isatty()),
        )
        results = []
        with nullcontext() if out_dir is None else Output(out_dir) as out:
            try:
                for batch in self.preprocess(pictures, batch_size):
                    for picture, sample in self._predict(batch):
                        results += self.postprocess([picture], [sample], task, out)
            finally:  # also of a run that is interrupted
                if out is not None:
                    out.write_results(results)
        return results

    def preprocess(
        self, pictures: Iterable[Picture], batch_size: int = 1
    ) -> Iterator[List[_Item]]:
        """Run the test pipeline; yields pictures of one size, or those with errors."""
        batch: List[_Item] = []
        for picture in pictures:
            item = self._prepare(picture)
            full = len(batch) == batch_size
            if batch and (full or _size_at_input(item) != _size_at_input(batch[0])):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def forward(self, inputs: List[dict]) -> List[BaseDataElement]:
        """Predict on outputs of the test pipeline; predictions come to the CPU."""
        return [sample.cpu() for sample in super().forward(self.collate_fn(inputs))]

    def visualize(
        self, inputs: List[np.ndarray], preds: List[BaseDataElement], task: Task
    ) -> List[np.ndarray]:
        """Draw predictions on BGR pictures; returns RGB pictures of the same sizes."""
        return [
            task.draw(self.visualizer, mmcv.bgr2rgb(image), sample)
            for image, sample in zip(inputs, preds)
        ]

    def postprocess(
        self,
        pictures: Sequence[Picture],
        preds: Sequence[Optional[BaseDataElement]],
        task: Task,
        out: Optional[Output] = None,
    ) -> List[Dict[str, Any]]:
        """Make results of predictions, and write what there is to write."""
        results = []
        for picture, sample in zip(pictures, preds):
            result = _describe_input(picture)
            results.append(result)
            if sample is None:
                continue
            result.update(task=task.name, **task.describe(sample))
            if out is not None:
                try:
                    self._write(result, picture, sample, task, out)
                except Exception as error:
                    result['error'] = (
                        f'cannot be drawn or written ({describe_error(error)})'
                    )
        return results

    def _prepare(self, picture: Picture) -> _Item:
        if picture.error is not None:
            return picture, None
        shape = picture.image.shape[:2]
        inputs = dict(
            img=picture.image,
            img_shape=shape,
            ori_shape=shape,
            # Only because mmdet's PackDetInputs asks for them.
            img_path=str(picture.source.label),
            img_id=0,
        )
        try:
            return picture, self.pipeline(inputs)
        except Exception as error:
            return picture.failed(error), None

    def _predict(
        self, batch: List[_Item]
    ) -> List[Tuple[Picture, Optional[BaseDataElement]]]:
        """Predict a batch; if that fails, its pictures one by one."""
        pictures, inputs = zip(*batch)
        if inputs[0] is None:  # those with errors are batches of their own
            return [(picture, None) for picture in pictures]
        try:
            return list(zip(pictures, self.forward(list(inputs))))
        except Exception as error:
            failed = pictures[0].failed(error)
        # Not above, where the error keeps the memory that may have run out.
        if len(batch) == 1:
            return [(failed, None)]
        return [pair for item in batch for pair in self._predict([item])]

    def _write(
        self,
        result: Dict[str, Any],
        picture: Picture,
        sample: BaseDataElement,
        task: Task,
        out: Output,
    ) -> None:
        labels = task.label_map(sample)
        if labels is not None:
            result['label_map'] = out.write_label_map(picture, labels)
        (drawn,) = self.visualize([picture.image], [sample], task)
        result['drawn'] = out.write_drawn(picture, drawn)

    def _load(self, path: str) -> np.ndarray:
        return self._loader(dict(img_path=path))['img']

    def _init_model(self, cfg: Config, weights: str, device: str) -> nn.Module:
        return load_model(cfg, weights, device, **self._loading)

    def _init_pipeline(self, cfg: Config) -> Callable:
        """The test pipeline between loading the picture and collating."""
        first, *others = _test_dataset(cfg).pipeline
        if not first['type'].endswith('LoadImageFromFile'):
            raise ValueError(
                'The test pipeline must begin with LoadImageFromFile, got '
                f'{first["type"]}.'
            )
        self._loader = TRANSFORMS.build(first)
        return Compose([step for step in others if 'Annotations' not in step['type']])

    def _init_collate(self, cfg: Config) -> Callable:
        return pseudo_collate

    def _init_visualizer(self, cfg: Config) -> Visualizer:
        self.classes, palette = _classes_and_palette(cfg, self.model.dataset_meta)
        options = dict(cfg.get('visualizer') or {})
        kind = options.pop('type', TASKS[self.scope].visualizer)
        # It draws and does not log, and is not shared with other inferencers.
        for key in ('name', 'vis_backends', 'save_dir'):
            options.pop(key, None)
        with VISUALIZERS.switch_scope_and_registry(self.scope) as registry:
            visualizer = registry.get(kind)(**options)
        visualizer.dataset_meta = dict(classes=self.classes, palette=palette)
        return visualizer


def _size_at_input(item: _Item) -> Optional[Tuple[int, ...]]:
    _, data = item
    return None if data is None else tuple(data['inputs'].shape)


def _describe_input(picture: Picture) -> Dict[str, Any]:
    result = dict(input=picture.source.label)
    if picture.frame is not None:
        result['frame'] = picture.frame
    if picture.error is not None:
        result['error'] = picture.error
    else:
        result['height'], result['width'] = picture.image.shape[:2]
    return result


def _test_dataset(cfg: Config) -> Any:
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def _classes_and_palette(
    cfg: Config, saved: Dict[str, Any]
) -> Tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Class names and their RGB colours: the checkpoint's, else the test dataset's."""
    dataset = DATASETS.build(dict(_test_dataset(cfg), lazy_init=True)).metainfo
    classes = saved.get('classes') or dataset.get('classes')
    if not classes:
        raise ValueError(
            'Neither the checkpoint nor the test dataset of the config has class '
            'names: set metainfo=dict(classes=...) there.'
        )
    for meta in (saved, dataset):
        if len(meta.get('palette') or ()) >= len(classes):
            return classes, meta['palette']
    colours = np.random.default_rng(0).integers(0, 256, (len(classes), 3))
    return classes, colours.tolist()
