# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Models with their weights: by name, or from a config."""

import difflib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..checkpoints.fit import check_fit, load_strictly
from ..checkpoints.layout import (
    class_names,
    dataset_meta,
    find_weights,
    to_own_names,
)
from ..checkpoints.pretrained import load_pretrained, require_weights
from ..checkpoints.reader import fetch_checkpoint, load_checkpoint_file
from ..engine.arguments import named_arguments
from ..engine.cuda_graph import replay_forward, use_cuda_graphs
from ..engine.parts import replace_sync_bn
from ..export.exported import exported_model, is_exported, require_no_options
from ..models import MLLA, fusing
from ..utils.allocator import keep_freed_memory

_NAMES = {f'mlla-{arch}': arch for arch in MLLA.arch_zoo}


class Classifier(nn.Module):
    """An image classifier in plain PyTorch: backbone, mean over the map, linear layer.

    Its parameters have the same names as in the classifiers of ``configs/``, so their
    checkpoints fit.

    Args:
        backbone (MLLA): The backbone. Its last output is classified.
        num_classes (int): Number of classes.
    """

    def __init__(self, backbone: MLLA, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        fc = nn.Linear(backbone.num_features[-1], num_classes)
        nn.init.trunc_normal_(fc.weight, std=0.02)
        nn.init.zeros_(fc.bias)
        self.head = nn.Sequential(OrderedDict(fc=fc))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        return self.head(self.backbone(x)[-1].mean(dim=(2, 3)))


def get_model(
    name: str,
    pretrained: Optional[Union[str, Path]] = None,
    num_classes: Optional[int] = None,
    features_only: bool = False,
    out_indices: Optional[Union[int, Sequence[int]]] = None,
    ema: bool = False,
    cuda_graph: bool = False,
    **backbone_cfg: Any,
) -> nn.Module:
    """Build MLLA by its name, without a config. Needs only torch, mmengine and mmcv.

    The published weights expect RGB images with pixel values in [0, 255], minus the
    mean (123.675, 116.28, 103.53), divided by the standard deviation (58.395, 57.12,
    57.375).

    Args:
        name (str): 'mlla-t', 'mlla-s' or 'mlla-b' (or 'mlla-tiny', ...).
        pretrained (str | Path, optional): The authors' ImageNet file or a checkpoint of
            ours, local or an http(s) address. None starts from random weights.
            Defaults to None.
        num_classes (int, optional): Number of classes. None means as many as in
            ``pretrained``, or 1000. If the file has another number, the linear layer
            starts from random weights, and the log says so. Defaults to None.
        features_only (bool): Return the backbone alone. If ``pretrained`` is a
            classifier, the output norms start fresh, as in the authors' recipe.
            Defaults to False.
        out_indices (int | Sequence[int], optional): Stages, 0 to 3, whose features the
            backbone returns. Only for ``features_only``. None means all.
            Defaults to None.
        ema (bool): Take the averaged weights of ``pretrained``, else the plain ones.
            Defaults to False.
        cuda_graph (bool): Replay the forward pass in evaluation without gradients as a
            CUDA graph, one for each size and number of images, see
            :class:`mlla_mm.engine.cuda_graph.GraphedForward`. Calls in training and on
            the CPU are as usual. Defaults to False.
        **backbone_cfg: Further arguments of :class:`mlla_mm.models.MLLA`, such as
            ``drop_path_rate``.

    Returns:
        nn.Module: A model in training mode. A classifier turns images (N, 3, H, W) into
        logits (N, num_classes). The backbone turns them into a tuple of features
        (N, C_i, H_i, W_i).

    Raises:
        FileNotFoundError: If the file ``pretrained`` does not exist.
        ValueError: If the name is unknown, or if arguments contradict each other.
        mlla_mm.checkpoints.reader.CheckpointError: If the weights do not fit.

    Examples:
        >>> from mlla_mm import get_model
        >>> model = get_model('mlla-t', pretrained='data/MLLA_T.pth').eval()
        >>> logits = model(images)
        >>> backbone = get_model('mlla-t', features_only=True, out_indices=(1, 2, 3))
    """
    if name.lower() not in _NAMES:
        nearest = difflib.get_close_matches(name.lower(), _NAMES, n=3, cutoff=0)
        raise ValueError(f"Unknown model '{name}'. Nearest: {', '.join(nearest)}.")
    arch = _NAMES[name.lower()]
    keep_freed_memory()
    model: nn.Module
    if features_only:
        if num_classes is not None:
            raise ValueError(
                'num_classes is an argument of the classifier: leave features_only out.'
            )
        if out_indices is None:
            out_indices = tuple(range(MLLA.num_stages))
        model = MLLA(arch, out_indices=out_indices, **backbone_cfg)
        if pretrained is not None:
            load_pretrained(model, pretrained, ema=ema)
    elif out_indices is not None:
        raise ValueError(
            'out_indices is an argument of the backbone: add features_only=True.'
        )
    else:
        backbone = MLLA(arch, out_indices=MLLA.num_stages - 1, **backbone_cfg)
        if pretrained is None:
            model = Classifier(backbone, 1000 if num_classes is None else num_classes)
        else:
            path = _local(pretrained)
            require_weights(path)
            content = load_checkpoint_file(path)
            weights = to_own_names(find_weights(content, str(pretrained), ema=ema))
            model = _pretrained_classifier(
                backbone, weights, str(pretrained), num_classes
            )
    if cuda_graph:
        replay_forward(model)
    return model


def _local(checkpoint: Union[str, Path]) -> Union[str, Path]:
    """The path of a checkpoint, which is downloaded if it is an address."""
    address = str(checkpoint)
    is_address = address.startswith(('http://', 'https://'))
    return fetch_checkpoint(address) if is_address else checkpoint


def _pretrained_classifier(
    backbone: MLLA,
    weights: Mapping[str, Tensor],
    source: str,
    num_classes: Optional[int],
) -> Classifier:
    fc = ('head.fc.weight', 'head.fc.bias')
    matrix, in_file = weights.get(fc[0]), 1000
    # check_fit() refuses a matrix of another shape.
    if matrix is not None and list(matrix.shape[1:]) == backbone.num_features[-1:]:
        in_file = len(matrix)
    model = Classifier(backbone, num_classes or in_file)
    own = model.state_dict()
    if matrix is not None and num_classes not in (None, in_file):
        print_log(
            f'The linear layer starts fresh: {source} has {in_file} classes, not '
            f'{num_classes}.',
            logger='current',
        )
        weights = {**weights, **{key: own[key] for key in fc}}
    check_fit(own, weights, source)
    # Old files lack BatchNorm's counters, which check_fit() allows.
    model.load_state_dict(weights, strict=False)
    return model


def load_model(
    cfg: Config,
    checkpoint: Union[str, Path],
    device: Optional[str] = None,
    ema: Optional[bool] = None,
    trust_checkpoint: bool = False,
    fuse_conv_bn: bool = False,
    cuda_graph: bool = False,
) -> BaseModel:
    """Build the model of a config, in evaluation mode, with a checkpoint's weights.

    Args:
        cfg (Config): Config of any task. It is not changed.
        checkpoint (str | Path): The authors' file or ours, local or an http(s) address.
            Or an ONNX file of a whole model from ``tools/export.py``, which runs in the
            model's place.
        device (str, optional): Such as 'cpu' or 'cuda:1'. None takes a GPU if there is
            one. Defaults to None.
        ema (bool, optional): True takes the averaged weights, False the plain ones.
            None takes the average of MMEngine's EMAHook, as MMEngine does, and the
            plain ones of other files. Defaults to None.
        trust_checkpoint (bool): Let the checkpoint run the code that it may contain, as
            ``trust_checkpoint`` in a config does. Defaults to False.
        fuse_conv_bn (bool): Fold every BatchNorm into the convolution before it, see
            :func:`mlla_mm.models.fusing.fuse_conv_bn`. Defaults to False.
        cuda_graph (bool): Replay the backbone as a CUDA graph, one for each size and
            number of images, see :class:`mlla_mm.engine.cuda_graph.GraphedForward`.
            Defaults to False.

    Returns:
        BaseModel: The model. Its attribute ``dataset_meta`` (dict) holds the class
        names and colours of the checkpoint, as far as there are any.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If the device cannot be used or has no CUDA graphs, the weights do
            not fit, ``cuda_graph`` finds no backbone of ours, or an option is for
            checkpoints and the file is exported.
    """
    if is_exported(checkpoint):
        require_no_options(ema=ema, fuse_conv_bn=fuse_conv_bn, cuda_graph=cuda_graph)
        return MODELS.build(exported_model(cfg, checkpoint, device)).eval()
    device = device or get_device()
    _require_device(device)
    if cuda_graph and torch.device(device).type != 'cuda':
        raise ValueError(
            f"cuda_graph needs a CUDA device, and this is '{device}': leave it out."
        )
    # None means what trust_checkpoints() has set for this process.
    trust = trust_checkpoint or cfg.get('trust_checkpoint') or None
    content = load_checkpoint_file(_local(checkpoint), trust=trust)
    weights = to_own_names(find_weights(content, str(checkpoint), ema=ema))
    model_cfg = cfg.model.copy()
    # In evaluation they are the same, but SyncBN needs a process group.
    replace_sync_bn(model_cfg)
    scope = DefaultScope.overwrite_default_scope(cfg.get('default_scope'))
    with named_arguments(cfg), scope:
        model = MODELS.build(model_cfg)
    load_strictly(model, weights, str(checkpoint))
    model.dataset_meta = _dataset_meta(content)
    model.to(device).eval()
    if fuse_conv_bn:
        fusing.fuse_conv_bn(model)
    if cuda_graph:
        use_cuda_graphs(model)
    return model


def _dataset_meta(checkpoint: Any) -> Dict[str, Any]:
    """Class names and colours in a checkpoint, as far as they are well-formed."""
    result: Dict[str, Any] = {}
    classes, palette = class_names(checkpoint), dataset_meta(checkpoint).get('palette')
    if classes:
        result['classes'] = classes
    if isinstance(palette, (list, tuple)) and all(map(_is_colour, palette)):
        result['palette'] = palette
    return result


def _is_colour(value: Any) -> bool:
    """Whether a value is red, green and blue, each an int from 0 to 255."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(part, int) and 0 <= part < 256 for part in value)
    )


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # Without CUDA, PyTorch raises an AssertionError. A missing backend raises a
    # NotImplementedError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Device '{device}' cannot be used: {reason}") from error
