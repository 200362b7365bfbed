# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""An exported file in the place of the model of a config."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn

from .errors import ExportError
from .formats import Runner, onnx_runner
from .parts import TASKS

CONVERSIONS = ('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb')
"""Options by which data preprocessors reverse the order of three channels."""


def is_exported(path: Union[str, Path]) -> bool:
    """Whether a path names an exported file and no checkpoint, by its suffix."""
    return str(path).endswith('.onnx')


def reverses_channels(model_cfg: Mapping[str, Any]) -> bool:
    """Whether the network of a config takes channels in another order than files."""
    preprocessor = model_cfg.get('data_preprocessor') or {}
    return any(preprocessor.get(key) for key in CONVERSIONS)


def require_no_options(**options: Any) -> None:
    """Refuse options that change a model, which an exported file already is.

    Args:
        **options: Their values, which are None or False if they are not given.

    Raises:
        ValueError: If one of them is given.
    """
    for name, value in options.items():
        if value:
            raise ValueError(
                f'{name} changes a model, and an exported file stays as it is: leave '
                'it out, or give the checkpoint.'
            )


def require_task(
    path: Union[str, Path], metadata: Mapping[str, str], task: str
) -> None:
    """Refuse a file that is no whole model of a task.

    Args:
        path (str | Path): The file, for the error.
        metadata (Mapping[str, str]): What the file says about itself.
        task (str): The task of the config.

    Raises:
        ExportError: If the file has another task or none.
    """
    if metadata.get('task') != task:
        what = metadata.get('task', 'no whole model of tools/export.py')
        raise ExportError(
            f'{path} is {what}, and the config is {task}: give the config of the '
            'exported model.'
        )


def exported_model(
    cfg: Config, path: Union[str, Path], device: Optional[str] = None
) -> Dict[str, Any]:
    """What stands for ``model`` in a config, to predict by an exported file.

    Args:
        cfg (Config): The config, with the model that was exported.
        path (str | Path): The file.
        device (str, optional): As in :class:`OnnxModel`. Defaults to None.
    """
    return dict(
        type='mlla_mm.export.exported.OnnxModel',
        file=str(path),
        task=TASKS.get(cfg.get('default_scope'), 'of no task'),
        reverse_channels=reverses_channels(cfg.model),
        device=device,
    )


class ExportedModel(BaseModel):
    """Predicts as mmdet's, mmseg's and mmpretrain's models do, by an exported file.

    Its samples are the same: boxes, masks and label maps are in the frame of the
    picture before it was resized. It takes what a test pipeline gives.

    Args:
        run (Callable): Runs the file.
        outputs (Sequence[str]): Names of the outputs.
        metadata (Mapping[str, str]): What the file says about itself.
        reverse_channels (bool): Whether the file takes the channels in another order
            than the pipeline gives.

    Attributes:
        dataset_meta (dict): Class names and colours, as far as the file has them.
    """

    def __init__(
        self,
        run: Runner,
        outputs: Sequence[str],
        metadata: Mapping[str, str],
        reverse_channels: bool,
    ) -> None:
        super().__init__()
        self.run, self.outputs = run, list(outputs)
        self.metadata = {key: _parse(value) for key, value in metadata.items()}
        self.task: str = self.metadata['task']
        self.reverse_channels = reverse_channels
        #: A detector's score threshold, which may be set to another one.
        self.test_cfg: Dict[str, Any] = dict(
            score_thr=self.metadata.get('score_threshold')
        )
        self.dataset_meta: Dict[str, Any] = {}
        if self.metadata.get('classes'):
            self.dataset_meta['classes'] = self.metadata['classes']
            # mmdet draws with tuples alone.
            self.dataset_meta['palette'] = list(map(tuple, self.metadata['palette']))
        # DistributedDataParallel refuses a model without parameters.
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        inputs: Sequence[Tensor],
        data_samples: Sequence[BaseDataElement],
        mode: str = 'predict',
    ) -> List[BaseDataElement]:
        """Predict.

        Args:
            inputs (Sequence[Tensor]): Images (C, H, W) from a pipeline.
            data_samples (Sequence): Their samples, which get the predictions.
            mode (str): 'predict', the only mode. Defaults to 'predict'.

        Raises:
            ValueError: If the mode is another one.
        """
        if mode != 'predict':
            raise ValueError(f"An exported file predicts, and mode is '{mode}'.")
        return [self._predict(x, sample) for x, sample in zip(inputs, data_samples)]

    def _predict(self, image: Tensor, sample: BaseDataElement) -> BaseDataElement:
        if self.reverse_channels and len(image) == 3:
            image = image.flip(0)
        image = image.float()
        if self.metadata['normalization'] == 'outside':
            mean, std = (
                image.new_tensor(self.metadata[key])[:, None, None]
                for key in ('mean', 'std')
            )
            image = (image - mean) / std
        inputs = [image[None]]
        if self.task == 'detection':
            inputs.append(torch.tensor(float(self.test_cfg['score_thr'])))
        elif self.task == 'segmentation':
            inputs.append(torch.tensor(sample.ori_shape[:2]))
        found = dict(zip(self.outputs, self.run(*inputs)))
        return _WRITERS[self.task](sample, found, self.metadata)


class OnnxModel(ExportedModel):
    """An ONNX file in the place of a model, for ``model`` in a config.

    Args:
        file (str): The file.
        task (str): The task of the config.
        reverse_channels (bool): As in :class:`ExportedModel`.
        device (str, optional): 'cpu', or 'cuda' with or without a number. None takes
            CUDA if the installed onnxruntime has it. Defaults to None.

    Raises:
        FileNotFoundError: If there is no such file.
        ExportError: If onnxruntime is missing, has not the device, or cannot read the
            file, or if it is no whole model of the task.
    """

    def __init__(
        self,
        file: str,
        task: str,
        reverse_channels: bool,
        device: Optional[str] = None,
    ) -> None:
        if not Path(file).is_file():
            raise FileNotFoundError(f'Exported file not found: {file}')
        run, outputs, metadata = onnx_runner(Path(file), device)
        require_task(file, metadata, task)
        super().__init__(run, outputs, metadata, reverse_channels)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # a text that stands for itself
        return text


def _write_detections(
    sample: Any, found: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> BaseDataElement:
    instances = InstanceData(
        bboxes=found['boxes'], scores=found['scores'], labels=found['labels']
    )
    if 'masks' in found:
        _mask_head().predict_by_feat(
            # As NumPy's, because mmdet makes a tensor of it in a way that warns.
            mask_preds=[found['masks'][:, None].numpy()],
            results_list=[instances],
            batch_img_metas=[sample.metainfo],
            rcnn_test_cfg=ConfigDict(mask_thr_binary=metadata['mask_threshold']),
            rescale=True,
            activate_map=True,
        )
    else:
        scale = instances.bboxes.new_tensor(sample.scale_factor).repeat(2)
        instances.bboxes = instances.bboxes / scale
    sample.pred_instances = instances
    return sample


@lru_cache(maxsize=1)
def _mask_head() -> Any:
    """What moves boxes into the frame of a picture, and pastes masks into them."""
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    # Its loss, which nothing here uses, is built by the default scope.
    with DefaultScope.overwrite_default_scope('mmdet'):
        return FCNMaskHead(
            num_convs=0,
            in_channels=1,
            conv_out_channels=1,
            num_classes=1,
            class_agnostic=True,
        )


def _write_label_map(
    sample: Any, found: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> BaseDataElement:
    if 'logits' in found:
        (logits,) = found['logits']
        # As mmseg.
        logits = logits.sigmoid() if len(logits) == 1 else logits
        sample.seg_logits = PixelData(data=logits)
    sample.pred_sem_seg = PixelData(data=found['labels'])
    return sample


def _write_classes(
    sample: Any, found: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> BaseDataElement:
    scores = found['scores'][0]
    if 'label_threshold' in metadata:  # of several labels
        labels = (scores >= metadata['label_threshold']).nonzero()[:, 0]
    else:
        labels = scores.topk(metadata.get('labels_per_image', 1)).indices
    return sample.set_pred_score(scores).set_pred_label(labels)


_WRITERS = {
    'detection': _write_detections,
    'segmentation': _write_label_map,
    'classification': _write_classes,
}
