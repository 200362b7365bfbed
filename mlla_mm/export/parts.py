# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What can be exported: a whole model, its backbone, or the logits of a classifier."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..models import LinearAttentionSwin
from ..models.layers import LinearAttention
from .errors import ExportError, require_prediction

TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}
"""The tasks by the default scopes of their configs."""

Axes = Mapping[int, str]


class Part(NamedTuple):
    """A part of a model to export.

    Attributes:
        module (nn.Module): Turns images (N, in_channels, H, W), and the values of
            ``settings``, into a tuple of tensors.
        in_channels (int): Number of image channels.
        outputs (dict[str, dict[int, str]]): Names of the outputs, and names of their
            axes that have no fixed size.
        metadata (dict[str, Any]): What the file says about itself, as for JSON.
            Defaults to {}.
        settings (dict[str, Tensor]): Names of further inputs, and their usual values.
            Defaults to {}.
        model (BaseModel, optional): The model that this is the whole of.
            Defaults to None.
        reverse_channels (bool): Whether the module takes the three channels of images
            in another order than the model. Defaults to False.
    """

    module: nn.Module
    in_channels: int
    outputs: Mapping[str, Axes]
    metadata: Mapping[str, Any] = {}
    settings: Mapping[str, Tensor] = {}
    model: Optional[BaseModel] = None
    reverse_channels: bool = False

    @property
    def is_detector(self) -> bool:
        """Whether the module takes one image at a time."""
        return self.metadata.get('task') == 'detection'


def select_part(model: nn.Module, part: str) -> Part:
    """Select a part whose input is normalised images.

    Args:
        model (nn.Module): A model in evaluation mode, from
            :func:`mlla_mm.apis.load_model` or :func:`mlla_mm.get_model`.
        part (str): 'backbone' for the feature maps ``stage0``, ``stage1`` and so on, or
            'classifier' for ``logits``.

    Raises:
        ExportError: If the model has no such part.
    """
    backbone: Any = getattr(model, 'backbone', model)
    _require_exportable(model)
    if part == 'backbone':
        outputs = {}
        for i in backbone.out_indices:
            name = f'stage{i}'
            outputs[name] = {0: 'batch', 2: f'{name}_height', 3: f'{name}_width'}
        return Part(backbone, backbone.in_channels, outputs)
    if not hasattr(model, 'head'):
        raise ExportError(
            f"{type(model).__name__} is not a classifier: export it with part 'model', "
            "or its backbone with part 'backbone'."
        )
    logits = _Logits(model).train(model.training)
    return Part(logits, backbone.in_channels, {'logits': {0: 'batch'}})


def whole_model(
    model: BaseModel,
    task: str,
    reverse_channels: bool,
    metadata: Mapping[str, Any],
    normalize: bool = True,
    logits: bool = False,
) -> Part:
    """Select a whole model, from images to what the model predicts.

    Images are float32 in the channel order of the network, with the values that they
    have in files, such as 0 to 255. Normalising and padding are done inside.

    Args:
        model (BaseModel): A model in evaluation mode, from
            :func:`mlla_mm.apis.load_model`.
        task (str): 'detection' for ``boxes`` (K, 4), ``scores`` (K,), ``labels`` (K,)
            and, if the model has masks, ``masks`` (K, h, w): probabilities within the
            boxes. 'segmentation' for ``labels`` (N, H, W). 'classification' for
            ``scores`` (N, num_classes), probabilities, each for itself if images have
            several labels. A detector has the setting ``score_threshold`` (), and a
            segmentor ``output_size`` (2,), the height and width of its labels: 0 is
            that of the images.
        reverse_channels (bool): Whether the model's data preprocessor turns BGR images
            into RGB ones, so that the file takes RGB. Else it takes BGR.
        metadata (Mapping): What else the file is to say about itself.
        normalize (bool): Whether to normalise inside. Else the images are normalised
            before. Defaults to True.
        logits (bool): Whether a segmentor gives ``logits`` (N, num_classes, H, W)
            besides. Defaults to False.

    Raises:
        ExportError: If the model cannot be exported.
    """
    _require_exportable(model)
    # Its pooling layers are replaced.
    module = copy.deepcopy(model)
    before = _Preprocessing(module.data_preprocessor, normalize)
    order = 'RGB' if reverse_channels else 'BGR'
    if channels_of(module) != 3:
        order = 'as in the files'
    described = {'task': task, 'channel_order': order, **before.describe(), **metadata}
    if logits and task != 'segmentation':
        raise ExportError(f'logits is an option of segmentors, and this is {task}.')
    whole: Any
    outputs: Dict[str, Axes]
    settings: Dict[str, Tensor] = {}
    if task == 'detection':
        whole = _Detector(module, before)
        names = ['boxes', 'scores', 'labels', *(['masks'] if whole.has_masks else [])]
        outputs = {name: {0: 'detections'} for name in names}
        settings['score_threshold'] = torch.tensor(whole.score_threshold)
    elif task == 'segmentation':
        whole = _Segmentor(module, before, logits)
        height, width = 'output_height', 'output_width'
        outputs = {'labels': {0: 'batch', 1: height, 2: width}}
        if logits:
            outputs['logits'] = {0: 'batch', 2: height, 3: width}
        settings['output_size'] = torch.zeros(2, dtype=torch.long)
    else:
        whole = _Classifier(module, before)
        outputs = {'scores': {0: 'batch'}}
    described.update(whole.describe())
    return Part(
        whole.eval(),
        channels_of(module),
        outputs,
        described,
        settings,
        model,
        reverse_channels,
    )


def channels_of(model: Any) -> int:
    """Channels of a model's images. Other backbones than ours take three."""
    return getattr(model.backbone, 'in_channels', 3)


def _require_exportable(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LinearAttention) and module.A_log is not None:
            raise ExportError(
                'The recurrence of the forget gate runs token by token, and an '
                'exported file takes any number of tokens. Export a model with '
                'forget_gate=False.'
            )
        if isinstance(module, LinearAttentionSwin) and module.ape is not None:
            raise ExportError(
                f'ape = {module.ape} names the only image size of this model, and an '
                'exported file takes any size. Export a model without ape.'
            )


class _Logits(nn.Module):
    """A classifier that returns a tuple, as backbones do."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tuple[Tensor]:
        # mmpretrain's classifiers, too, return logits if images are all they get.
        return (self.classifier(images),)


#: MMEngine's, which is mmdet's base class, and mmseg's and mmpretrain's.
_DATA_PREPROCESSORS = {
    'ImgDataPreprocessor',
    'SegDataPreProcessor',
    'ClsDataPreprocessor',
}


class _Preprocessing(nn.Module):
    """What a data preprocessor of MMEngine, mmdet, mmseg or mmpretrain does in a test.

    ::

        x = (images - mean) / std, padded below and on the right to multiples

    Args:
        preprocessor (nn.Module): The data preprocessor.
        normalize (bool): Whether to normalise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessor: Any, normalize: bool) -> None:
        super().__init__()
        kinds = [kind.__name__ for kind in type(preprocessor).__mro__]
        if not _DATA_PREPROCESSORS.intersection(kinds):
            raise ExportError(
                f'A data_preprocessor of type {kinds[0]} is not exported: what it does '
                'to images is not known. Export the backbone alone, with part '
                "'backbone'."
            )
        mean: Any = getattr(preprocessor, 'mean', None)
        has_mean = mean is not None
        self.normalize = normalize and has_mean
        std = preprocessor.std if has_mean else torch.ones(1)
        mean = mean if has_mean else torch.zeros(1)
        self.register_buffer('mean', mean.clone().float())
        self.register_buffer('std', std.clone().float())
        # mmseg's pads in a test only if its test_cfg says so.
        if hasattr(preprocessor, 'test_cfg'):
            test_cfg = preprocessor.test_cfg or {}
            if test_cfg.get('size') is not None:
                raise ExportError(
                    'data_preprocessor.test_cfg.size pads to one size, and an exported '
                    'file takes any size. Use size_divisor.'
                )
            self.divisor = test_cfg.get('size_divisor') or 1
            self.pad_value = preprocessor.pad_val
        else:
            self.divisor = getattr(preprocessor, 'pad_size_divisor', 1)
            self.pad_value = getattr(preprocessor, 'pad_value', 0)

    def describe(self) -> Dict[str, Any]:
        """What the file says of its input."""
        return dict(
            mean=_decimals(self.mean),
            std=_decimals(self.std),
            normalization='inside' if self.normalize else 'outside',
            pad_size_divisor=self.divisor,
            padding='inside, on the right and below, after normalization',
        )

    def forward(self, images: Tensor) -> Tensor:
        if self.normalize:
            images = (images - self.mean) / self.std
        if self.divisor == 1:
            return images
        height, width = images.shape[-2:]
        return F.pad(
            images,
            (0, -width % self.divisor, 0, -height % self.divisor),
            value=self.pad_value,
        )


def _decimals(values: Tensor) -> List[float]:
    """Float32 values as a config would have them."""
    return [float(f'{value:.7g}') for value in values.flatten().tolist()]


class _Classifier(nn.Module):
    """Images to the probabilities of classes."""

    def __init__(self, model: Any, before: _Preprocessing) -> None:
        super().__init__()
        from mmpretrain.models import ClsHead, ImageClassifier, MultiLabelClsHead

        require_prediction(model, ImageClassifier)
        require_prediction(model.head, ClsHead, MultiLabelClsHead)
        self.before, self.model = before, model
        self.has_many_labels = isinstance(model.head, MultiLabelClsHead)

    def describe(self) -> Dict[str, Any]:
        """What the file says of its outputs."""
        if not self.has_many_labels:
            return {}
        head: Any = self.model.head
        # As the head's, the threshold counts before the number.
        if head.thr is not None:
            return dict(label_threshold=float(head.thr))
        return dict(labels_per_image=int(head.topk))

    def forward(self, images: Tensor) -> Tuple[Tensor]:
        logits = self.model(self.before(images))
        return (logits.sigmoid() if self.has_many_labels else logits.softmax(-1),)


class _Segmentor(nn.Module):
    """Images to label maps of their size and, on request, logits."""

    def __init__(self, model: Any, before: _Preprocessing, logits: bool) -> None:
        super().__init__()
        from mmseg.models import EncoderDecoder
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead

        require_prediction(model, EncoderDecoder)
        require_prediction(model.decode_head, BaseDecodeHead)
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise ExportError(
                f"model.test_cfg.mode = '{model.test_cfg.mode}' predicts window by "
                'window, and an exported file takes whole images. Set '
                "model.test_cfg.mode='whole'."
            )
        for name, pool in list(model.named_modules()):
            if isinstance(pool, nn.AdaptiveAvgPool2d):
                parent = model.get_submodule(name.rpartition('.')[0])
                setattr(parent, name.rpartition('.')[2], _AdaptiveAvgPool2d(pool))
        self.before, self.model, self.logits = before, model, logits
        self.threshold: Any = getattr(model.decode_head, 'threshold', None)

    def describe(self) -> Dict[str, Any]:
        """What the file says of its outputs."""
        described: Dict[str, Any] = dict(
            label_frame='pixels of the input, or of output_size where that is not 0'
        )
        if self.threshold is not None:  # a head of one class
            described['label_threshold'] = float(self.threshold)
        return described

    def forward(
        self, images: Tensor, output_size: Optional[Tensor] = None
    ) -> Tuple[Tensor, ...]:
        x = self.before(images)
        logits = self.model.decode_head(self.model.extract_feat(x))
        logits = self._resize(logits, x.shape[-2:])
        height, width = images.shape[-2:]
        logits = logits[..., :height, :width]  # without the padding
        if output_size is not None:
            sides = [
                torch.where(side > 0, side, side.new_full((), own))
                for side, own in zip(output_size.unbind(), (height, width))
            ]
            logits = self._resize(logits, sides)
        if logits.shape[1] == 1:
            labels = (logits[:, 0].sigmoid() > self.threshold).long()
        else:
            labels = logits.argmax(1)
        return (labels, logits) if self.logits else (labels,)

    def _resize(self, logits: Tensor, size: Sequence) -> Tensor:
        return F.interpolate(
            logits,
            tuple(size),
            mode='bilinear',
            align_corners=self.model.align_corners,
        )


class _AdaptiveAvgPool2d(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products, which ONNX has for every size.

    Along an axis of n pixels, bin i of k averages the pixels from floor(i n / k) to
    ceil((i + 1) n / k) - 1.
    """

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size: Any = pool.output_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (_averages(n, k, x) for n, k in zip(x.shape[-2:], self.size))
        return rows @ x @ columns.transpose(0, 1)


def _averages(pixels: int, bins: int, like: Tensor) -> Tensor:
    """The matrix (bins, pixels) that averages the pixels of each bin."""
    place = torch.arange(pixels, device=like.device)
    bin_ = torch.arange(bins, device=like.device)[:, None]
    start = bin_ * pixels // bins
    end = ((bin_ + 1) * pixels + bins - 1) // bins
    inside = ((place >= start) & (place < end)).to(like)
    return inside / (end - start).to(like)


class _Detector(nn.Module):
    """An image and a score threshold to detections."""

    def __init__(self, model: Any, before: _Preprocessing) -> None:
        super().__init__()
        from .detectors import make_detector

        self.before, self.detect = before, make_detector(model)
        self.has_masks = bool(getattr(model, 'with_mask', False))
        options = model.test_cfg
        # A two-stage detector has options for each stage.
        self.options = options.get('rcnn', options)
        self.score_threshold = float(self.options.get('score_thr', 0))

    def describe(self) -> Dict[str, Any]:
        """What the file says of its outputs."""
        described = dict(
            score_threshold=self.score_threshold,
            box_frame='(x1, y1, x2, y2) in pixels of the input, before padding',
        )
        if self.has_masks:
            described['mask_frame'] = 'probabilities on a grid over each box'
            described['mask_threshold'] = float(self.options.mask_thr_binary)
        return described

    def forward(self, images: Tensor, score_threshold: Tensor) -> Tuple[Tensor, ...]:
        height, width = images.shape[-2:]
        sides = (width, height, width, height)
        # Other ways of making a tensor of sizes fix them in a trace.
        limits = torch.stack([images.new_full((), side) for side in sides])
        return self.detect(self.before(images), limits, score_threshold)
