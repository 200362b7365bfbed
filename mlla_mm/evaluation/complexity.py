# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Parameters, FLOPs and activations of a model, beside the paper's."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, parameter_count
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape
from mmengine.analysis.print_helper import complexity_stats_table
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from ..engine.arguments import named_arguments
from ..engine.parts import replace_sync_bn, require_parts
from ..ops.scan import _DecayedScan
from .published import PublishedModel

Shape = Tuple[int, int]

#: Height and width of the image that the paper counts with, by task.
IMAGE_SHAPES: Dict[str, Shape] = {
    'mmpretrain': (224, 224),
    'mmdet': (800, 1280),
    'mmseg': (512, 2048),
}
#: FLOPs of a forget gate's recurrence, per token, channel and state. The papers of
#: vision Mamba count so, after https://github.com/state-spaces/mamba/issues/110.
SCAN_FLOPS = 9
# In a traced graph it is one node.
_SCAN = f'prim::PythonOp.{_DecayedScan.__name__}'


class Complexity(NamedTuple):
    """The cost of a model.

    Attributes:
        shape (tuple[int, int]): Height and width of the image.
        parameters (int): Number of parameters, with those of auxiliary heads.
        flops (int): Multiply-adds of one image in evaluation.
        activations (int): Output elements of convolutions, linear layers, matrix
            products and the recurrences of forget gates.
        table (str): Parameters, FLOPs and activations by module.
        scan_flops (int): The part of ``flops`` that are those of recurrences, see
            :data:`SCAN_FLOPS`.
    """

    shape: Shape
    parameters: int
    flops: int
    activations: int
    table: str
    scan_flops: int = 0


def count_complexity(
    cfg: Config, shape: Optional[Shape] = None, depth: int = 2
) -> Complexity:
    """Count what a config's model costs on one image, with MMEngine's analyzers.

    As in the published counts, a multiplication with an addition is one FLOP.
    Element-wise operations, NMS and RoIAlign do not count. A detector is counted on as
    many proposals as it makes, 1000 on an image of the paper's size: all go through the
    box head, 100 through the mask head. Auxiliary heads work in training only, and have
    no FLOPs here. The recurrence of a forget gate counts :data:`SCAN_FLOPS` for each
    token, channel and state.

    Args:
        cfg (Config): Config with a ``model``; no weights are loaded.
        shape (tuple[int, int], optional): Height and width of the image. None takes the
            paper's for the task, :data:`IMAGE_SHAPES`. Defaults to None.
        depth (int): Levels of modules in the table. Defaults to 2.

    Returns:
        Complexity: The counts.

    Raises:
        ValueError: If ``shape`` is not positive, or is None and the config's task is
            unknown, or if the config has no model.
    """
    scope = cfg.get('default_scope')
    if shape is None and scope not in IMAGE_SHAPES:
        raise ValueError(
            f'No image size is known for default_scope {scope!r}: give one (--shape).'
        )
    height, width = shape or IMAGE_SHAPES[scope]
    shape = height, width
    if min(shape) < 1:
        raise ValueError(f'The image size must be positive, got {shape}.')
    require_parts(cfg, 'model', user='A count')
    model_cfg = copy.deepcopy(cfg.model)
    replace_sync_bn(model_cfg)  # SyncBN has no kernel on the CPU
    with DefaultScope.overwrite_default_scope(scope):
        with named_arguments(cfg):
            model = MODELS.build(model_cfg).eval()
        if torch.cuda.is_available():
            model.cuda()
        if scope == 'mmdet':
            from mmdet.structures import DetDataSample

            # Without these a detector makes no proposals.
            sizes = dict.fromkeys(
                ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), shape
            )
            sample = DetDataSample(metainfo=dict(sizes, scale_factor=(1.0, 1.0)))
            model.forward = partial(model.forward, data_samples=[sample])
        device = next(model.parameters()).device
        image = torch.rand(1, 3, height, width, device=device)
        flops = FlopAnalyzer(model, (image,))
        flops.set_op_handle(_SCAN, _count_scan)
        flops.set_op_handle('aten::scaled_dot_product_attention', _count_softmax)
        activations = ActivationAnalyzer(model, (image,))
        activations.set_op_handle(_SCAN, generic_activation_jit('scan'))
        with torch.no_grad(), _recurrence_without_loop():
            # First: unlike the totals, the table warns about no operator.
            table = complexity_stats_table(
                flops, depth, activations, show_param_shapes=False
            )
            return Complexity(
                shape=shape,
                parameters=parameter_count(model)[''],
                flops=round(flops.total()),
                activations=round(activations.total()),
                table=table,
                scan_flops=flops.by_operator()['scan'],
            )


def _count_scan(inputs: List[Any], outputs: List[Any]) -> Counter:
    """FLOPs of the arguments of :func:`mlla_mm.ops.scan.decayed_scan`."""
    q, _, v = map(get_shape, inputs[:3])
    return Counter(scan=SCAN_FLOPS * math.prod(v) * q[-1])


def _count_softmax(inputs: List[Any], outputs: List[Any]) -> Counter:
    """FLOPs of the two products of a softmax attention."""
    q, k, v = map(get_shape, inputs[:3])
    return Counter(
        attention=math.prod(q) * k[-2] + math.prod(q[:-1]) * math.prod(v[-2:])
    )


@contextmanager
def _recurrence_without_loop() -> Iterator[None]:
    """Give zeros in the place of a recurrence's result.

    A trace would write out its loop over the tokens, which takes minutes.
    """

    def zeros(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Tensor) -> Tensor:
        return torch.zeros_like(v)

    recurrence: Any = _DecayedScan
    forward = recurrence.forward
    recurrence.forward = staticmethod(zeros)
    try:
        yield
    finally:
        recurrence.forward = staticmethod(forward)


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
    paper_parameters = published and published.paper_parameters
    paper_flops = published and published.paper_flops
    height, width = counted.shape
    return [
        name,
        f'{height}x{width}',
        f'{counted.parameters / 1e6:.2f} M',
        f'{paper_parameters / 1e6:g} M' if paper_parameters else '-',
        f'{counted.flops / 1e9:.2f} G',
        f'{paper_flops / 1e9:g} G' if paper_flops else '-',
        f'{100 * (counted.flops / paper_flops - 1):+.2f} %' if paper_flops else '-',
        f'{counted.activations / 1e6:.1f} M',
    ]


def scan_note(counted: Complexity, name: str) -> str:
    """How the recurrences of a model's forget gates are counted.

    Args:
        counted (Complexity): From :func:`count_complexity`.
        name (str): What to call the model.
    """
    return (
        f'{name}: {counted.scan_flops / 1e9:.2f} G of the FLOPs are the recurrence of '
        f'the forget gate, counted as {SCAN_FLOPS} per token, channel and state.'
    )
