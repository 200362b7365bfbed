# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Parameters, FLOPs and activations of a model, beside the paper's."""

import copy
from functools import partial
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, parameter_count
from mmengine.analysis.print_helper import complexity_stats_table
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ..engine.launch import replace_sync_bn
from .published import PublishedModel

Shape = Tuple[int, int]

#: Height and width of the image that the paper counts with, by task.
IMAGE_SHAPES: Dict[str, Shape] = {
    'mmpretrain': (224, 224),
    'mmdet': (800, 1280),
    'mmseg': (512, 2048),
}


class Complexity(NamedTuple):
    """What a model costs.

    Attributes:
        shape (tuple[int, int]): Height and width of the image.
        parameters (int): Number of parameters, those of auxiliary heads included.
        flops (int): Multiply-adds of one image in evaluation.
        activations (int): Output elements of convolutions, linear layers and matrix
            products.
        table (str): The three by module.
    """

    shape: Shape
    parameters: int
    flops: int
    activations: int
    table: str


def count_complexity(
    cfg: Config, shape: Optional[Shape] = None, depth: int = 2
) -> Complexity:
    """Count what a config's model costs on one image, with MMEngine's analyzers.

    As in the published counts, a multiplication with an addition is one FLOP, and
    element-wise operations, NMS and RoIAlign are none. A detector with proposals is
    counted on as many as it makes, 1000 on an image of the paper's size: all go through
    the box head, 100 through the mask head. Auxiliary heads work in training only.

    Args:
        cfg (Config): Config with a ``model``; no weights are loaded.
        shape (tuple[int, int], optional): Height and width of the image. None takes the
            paper's for the task, :data:`IMAGE_SHAPES`. Defaults to None.
        depth (int): Levels of modules in the table. Defaults to 2.

    Returns:
        Complexity: The counts.

    Raises:
        ValueError: If ``shape`` is not positive, or is None and the config's task is
            unknown.
    """
    scope = cfg.get('default_scope')
    if shape is None and scope not in IMAGE_SHAPES:
        raise ValueError(
            f'No image size is known for default_scope {scope!r}: give one (--shape).'
        )
    shape = tuple(shape or IMAGE_SHAPES[scope])
    if min(shape) < 1:
        raise ValueError(f'The image size must be positive, got {shape}.')
    with DefaultScope.overwrite_default_scope(scope):
        model = _build(cfg)
        if scope == 'mmdet':
            model.forward = partial(model.forward, data_samples=_data_samples(shape))
        device = next(model.parameters()).device
        image = torch.rand(1, 3, *shape, device=device)
        flops = FlopAnalyzer(model, (image,))
        activations = ActivationAnalyzer(model, (image,))
        with torch.no_grad():
            table = complexity_stats_table(
                flops, depth, activations, show_param_shapes=False
            )
            return Complexity(
                shape=shape,
                parameters=parameter_count(model)[''],
                flops=round(flops.total()),
                activations=round(activations.total()),
                table=table,
            )


def _build(cfg: Config) -> nn.Module:
    """The model in evaluation mode, on the GPU if there is one."""
    model_cfg = copy.deepcopy(cfg.model)
    # SyncBatchNorm has no kernel on the CPU.
    replace_sync_bn(model_cfg)
    model = MODELS.build(model_cfg).eval()
    return model.cuda() if torch.cuda.is_available() else model


def _data_samples(shape: Shape) -> list:
    """What a detector has to know of one image to make proposals."""
    from mmdet.structures import DetDataSample

    return [
        DetDataSample(
            metainfo=dict(
                img_shape=shape,
                ori_shape=shape,
                pad_shape=shape,
                batch_input_shape=shape,
                scale_factor=(1.0, 1.0),
            )
        )
    ]


#: Columns of :func:`complexity_row`.
COLUMNS = (
    'Config',
    'Image',
    'Params',
    'paper',
    'FLOPs',
    'paper',
    'difference',
    'Activations',
)


def complexity_row(
    counted: Complexity, name: str, published: Optional[PublishedModel]
) -> List[str]:
    """A model's counts beside the paper's, as texts under :data:`COLUMNS`.

    Args:
        counted (Complexity): From :func:`count_complexity`.
        name (str): What to call the model.
        published (PublishedModel, optional): The paper's figures; None if there are
            none for this model and image size.
    """
    paper_parameters = paper_flops = None
    if published is not None:
        paper_parameters = published.paper_parameters
        paper_flops = published.paper_flops
    difference = paper_flops and f'{100 * (counted.flops / paper_flops - 1):+.2f} %'
    height, width = counted.shape
    return [
        name,
        f'{height}x{width}',
        f'{counted.parameters / 1e6:.2f} M',
        f'{paper_parameters / 1e6:g} M' if paper_parameters else '-',
        f'{counted.flops / 1e9:.2f} G',
        f'{paper_flops / 1e9:g} G' if paper_flops else '-',
        difference or '-',
        f'{counted.activations / 1e6:.1f} M',
    ]
