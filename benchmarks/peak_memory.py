# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Peak memory of a training step, counted by PyTorch's allocators."""

import copy
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mlla_mm.checks.largest_size import pin_scales
from mlla_mm.engine.ema import ModelEMA
from mlla_mm.engine.launch import replace_sync_bn

OBJECTS = 10
"""Objects in every synthetic image of a detector."""


class Measured(NamedTuple):
    """Peak memory of a training step in bytes, and what the step was of."""

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

    Two optimiser steps on one device, the GPU if there is one: weights, gradients,
    optimiser states, activations, and the averaged weights of a MESA teacher.

    Args:
        cfg (Config): A detector's, segmentor's or classifier's config.
        batch_size (int, optional): Images. Defaults to None: the config's of a process.
        size (tuple[int, int], optional): Width and height. Defaults to None: the
            largest of the training pipeline.
        with_cp (bool): Recompute the backbone's blocks. Defaults to False.
        amp (str, optional): 'float16' or 'bfloat16', on a GPU. Defaults to None:
            float32.

    Raises:
        ValueError: For mixed precision without a GPU.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if amp and device == 'cpu':
        raise ValueError(f'amp={amp!r} needs a GPU, and torch sees none. Leave it out.')
    cfg = copy.deepcopy(cfg)
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
    batch = _BATCHES[cfg.default_scope](cfg, batch_size, size)

    model = MODELS.build(cfg.model).to(device).train()
    if hasattr(model, 'set_teacher'):
        teacher = ModelEMA(model, 0.5).module
        model.set_teacher(teacher)
    optim_wrapper = build_optim_wrapper(model, wrapper)

    def steps() -> None:
        for _ in range(2):  # the first one makes the optimiser's states
            model.train_step(copy.deepcopy(batch), optim_wrapper)

    resident = module_bytes(model)
    if hasattr(model, 'set_teacher'):
        resident += module_bytes(teacher)
    return Measured(peak_bytes(steps, device, resident), batch_size, size)


def peak_bytes(function: Callable[[], Any], device: str, resident: int = 0) -> int:
    """Peak memory of tensors while a function runs.

    Args:
        function (callable): What is measured.
        device (str): 'cpu', where the profiler's record of every allocation is added
            up, or 'cuda', where the allocator keeps the maximum itself.
        resident (int): Bytes of tensors that were there before; only for the CPU, whose
            record starts with the function. Defaults to 0.
    """
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == '[memory]']
    allocations.sort(key=_start)
    current = peak = 0
    for event in allocations:
        current += event.nbytes()
        peak = max(peak, current)
    return resident + peak


def _start(event: Any) -> int:
    # PyTorch before 2.3 counts in microseconds.
    return event.start_ns() if hasattr(event, 'start_ns') else event.start_us()


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def largest_size(cfg: Config) -> Tuple[int, int]:
    """Width and height of the largest training image that the config names."""
    fixed = cfg.model.get('data_preprocessor', {}).get('size')
    if fixed:
        return fixed[1], fixed[0]
    found = []
    pipeline = copy.deepcopy(cfg.train_dataloader.dataset.pipeline)
    pin_scales(pipeline)
    _collect_sizes(pipeline, found)
    return found[-1]


def _collect_sizes(config: Any, found: list) -> None:
    if isinstance(config, dict):
        scale = config.get('scale', config.get('scales'))
        if scale is not None and 'Resize' in config.get('type', ''):
            scale = scale[0] if 'scales' in config else scale
            pair = scale if isinstance(scale, (list, tuple)) else (scale, scale)
            found.append((max(pair), min(pair)))
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            _collect_sizes(value, found)


def _detection_batch(cfg: Config, batch_size: int, size: Tuple[int, int]) -> dict:
    from mmdet.testing import demo_mm_inputs

    width, height = size
    return demo_mm_inputs(
        batch_size,
        image_shapes=[(3, height, width)] * batch_size,
        num_items=[OBJECTS] * batch_size,
        num_classes=cfg.model.roi_head.bbox_head.num_classes,
        with_mask=True,
    )


def _segmentation_batch(cfg: Config, batch_size: int, size: Tuple[int, int]) -> dict:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    width, height = size
    samples = []
    for _ in range(batch_size):
        labels = torch.randint(cfg.model.decode_head.num_classes, (1, height, width))
        sample = SegDataSample(metainfo=dict(img_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=_images(batch_size, size), data_samples=samples)


def _classification_batch(cfg: Config, batch_size: int, size: Tuple[int, int]) -> dict:
    from mmpretrain.structures import DataSample

    labels = torch.randint(cfg.model.head.num_classes, (batch_size,)).tolist()
    samples = [DataSample().set_gt_label(label) for label in labels]
    return dict(inputs=torch.stack(_images(batch_size, size)), data_samples=samples)


def _images(batch_size: int, size: Tuple[int, int]) -> list:
    width, height = size
    return [
        torch.randint(256, (3, height, width), dtype=torch.uint8)
        for _ in range(batch_size)
    ]


_BATCHES: Dict[str, Callable] = {
    'mmdet': _detection_batch,
    'mmseg': _segmentation_batch,
    'mmpretrain': _classification_batch,
}
