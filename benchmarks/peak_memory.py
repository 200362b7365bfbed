# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Peak memory of a config's training step, on a synthetic batch."""

import copy
import math
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

from mlla_mm.checks.largest_size import pin_scales
from mlla_mm.engine.arguments import named_arguments
from mlla_mm.engine.ema import ModelEMA
from mlla_mm.engine.parts import (
    data_pipelines,
    kind_of,
    parts_of,
    replace_sync_bn,
    require_parts,
)
from mlla_mm.evaluation.complexity import IMAGE_SHAPES

from .meter import Meter, module_bytes

# Objects in every synthetic image of a detector.
_OBJECTS = 10


class Measured(NamedTuple):
    """Peak memory of a training step in bytes, and the batch of the step.

    Attributes:
        bytes (int): Peak memory of tensors.
        batch_size (int): Images.
        size (tuple[int, int]): Width and height of the images.
    """

    bytes: int
    batch_size: int
    size: Tuple[int, int]


def measure_config(
    cfg: Config,
    batch_size: Optional[int] = None,
    size: Optional[Tuple[int, int]] = None,
    with_cp: bool = False,
    amp: Optional[str] = None,
) -> Measured:
    """Measure a config's training step on a synthetic batch of the recipe's size.

    Two optimiser steps are made on one device, the GPU if there is one. Counted are
    weights, gradients, optimiser states, activations, and the averaged weights of a
    MESA teacher. nvidia-smi shows more: CUDA itself, and memory that PyTorch reserves.

    Args:
        cfg (Config): A detector's, segmentor's or classifier's config.
        batch_size (int, optional): Images. Defaults to None: as many as the config
            gives a process.
        size (tuple[int, int], optional): Width and height. Defaults to None: the
            largest of the training pipeline.
        with_cp (bool): Whether to recompute the backbone's blocks. Defaults to False.
        amp (str, optional): 'float16' or 'bfloat16', on a GPU. Defaults to None:
            float32.

    Raises:
        ValueError: If mixed precision is asked for without a GPU, or if the config has
            no model, optimizer, or training data that name what is not given.
    """
    meter = Meter()
    if amp and not meter.is_cuda:
        raise ValueError(f'amp={amp!r} needs a GPU, and torch sees none. Leave it out.')
    needed = ['model', 'optim_wrapper']
    if not (batch_size and size):
        needed.append('train_dataloader')  # for what is not given
    require_parts(cfg, *needed, user='A training step')
    cfg = copy.deepcopy(cfg)
    scope = cfg.get('default_scope')
    if scope not in IMAGE_SHAPES:
        raise ValueError(
            f'default_scope must be one of {list(IMAGE_SHAPES)}, got {scope!r}.'
        )
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(with_cp=with_cp, init_cfg=None)
    replace_sync_bn(cfg.model)
    wrapper = cfg.optim_wrapper
    wrapper.pop('loss_scale', None)
    wrapper.type = 'AmpOptimWrapper' if amp else 'OptimWrapper'
    if amp:
        wrapper.update(dtype=amp, loss_scale='dynamic')
    batch_size = batch_size or cfg.train_dataloader.batch_size
    size = size or largest_size(cfg)
    batch = synthetic_batch(cfg, batch_size, size)

    with named_arguments(cfg):
        model = MODELS.build(cfg.model).to(meter.device).train()
    resident = module_bytes(model)
    if hasattr(model, 'set_teacher'):
        teacher = ModelEMA(model, 0.5).module
        model.set_teacher(teacher)
        resident += module_bytes(teacher)
    with named_arguments(cfg):
        optim_wrapper = build_optim_wrapper(model, wrapper)

    def steps() -> None:
        for _ in range(2):  # the first step creates the optimiser's states
            model.train_step(copy.deepcopy(batch), optim_wrapper)

    return Measured(meter.peak_bytes(steps, resident), batch_size, size)


def largest_size(cfg: Config) -> Tuple[int, int]:
    """Width and height of the largest training image that the config names.

    Raises:
        ValueError: If it names none.
    """
    fixed = (cfg.model.get('data_preprocessor') or {}).get('size')
    if fixed:
        return fixed[1], fixed[0]
    found = []
    for _, pipeline in data_pipelines(cfg.train_dataloader):
        pipeline = copy.deepcopy(pipeline)
        pin_scales(pipeline)
        scales = [
            part['scales'][0] if 'scales' in part else part.get('scale')
            for part in parts_of(pipeline)
            if 'Resize' in (kind_of(part) or '')
        ]
        found += [scale for scale in scales if scale is not None][-1:]
    if not found:
        raise ValueError(
            'The training pipeline of the config has no Resize with a scale. Give the '
            'size of the images with --size.'
        )
    # The longer side first.
    pairs = [x if isinstance(x, (list, tuple)) else (x, x) for x in found]
    largest = max(pairs, key=math.prod)
    return max(largest), min(largest)


def synthetic_batch(
    cfg: Config, batch_size: int, size: Tuple[int, int]
) -> Dict[str, Any]:
    """Random images with random labels, as a model's ``train_step`` takes them.

    Args:
        cfg (Config): A detector's, segmentor's or classifier's config.
        batch_size (int): Images.
        size (tuple[int, int]): Width and height of the images.
    """
    width, height = size
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            batch_size,
            image_shapes=[(3, height, width)] * batch_size,
            num_items=[_OBJECTS] * batch_size,
            num_classes=cfg.model.roi_head.bbox_head.num_classes,
            with_mask=True,
        )

    def integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, (batch_size, *shape))

    images = torch.randint(256, (batch_size, 3, height, width), dtype=torch.uint8)
    if cfg.default_scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = []
        for labels in integers(cfg.model.decode_head.num_classes, 1, height, width):
            sample = SegDataSample(metainfo=dict(img_shape=(height, width)))
            sample.gt_sem_seg = PixelData(data=labels)
            samples.append(sample)
        return dict(inputs=list(images), data_samples=samples)

    from mmpretrain.structures import DataSample

    labels = integers(cfg.model.head.num_classes).tolist()
    return dict(
        inputs=images, data_samples=[DataSample().set_gt_label(x) for x in labels]
    )
