# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections.abc import Sequence
from typing import List, Optional, Union

from mmengine.registry import MODELS

from ...arch import ARCH_ZOO, check_flags, check_rate, check_ratio, parse_arch
from ..layers import MLLABlock, PatchMerging, Stem
from .staged import StagedBackbone


@MODELS.register_module()
class MLLA(StagedBackbone):
    """MLLA: a linear-attention vision backbone with Mamba's block design.

    It has a convolutional stem at stride 4, four stages of :class:`MLLABlock` with
    :class:`PatchMerging` between them, and a LayerNorm for each output. It implements
    `Demystify Mamba in Vision: A Linear Attention Perspective
    <https://arxiv.org/abs/2405.16605>`_, whose final version calls the model MILA.
    Parameters have the same names as in the official checkpoints.

    Attention is global, so padding an image changes its features everywhere.

    Args:
        arch (str | dict): 'tiny', 'small' or 'base' (or 't', 's', 'b'), or a dict with
            ``embed_dims`` (int, number of channels of the first stage, doubled in each
            later one), ``depths`` and ``num_heads`` (four ints each).
            Defaults to 'tiny'.
        in_channels (int): Number of image channels. Defaults to 3.
        mlp_ratio (float): Hidden channels of the MLPs, divided by their input channels.
            Defaults to 4.
        qkv_bias (bool): Whether the query-key projections have a bias.
            Defaults to True.
        drop_rate (float): Dropout after the stem and in the MLPs, in [0, 1).
            Defaults to 0.
        drop_path_rate (float): Stochastic depth rate of the last block, in [0, 1). The
            rate of the first block is 0, and it rises linearly. Defaults to 0.
        out_indices (int | Sequence[int]): Stages to return, 0 to 3. Negative numbers
            count from the end. Later stages than the last output exist, so that
            checkpoints fit, but they neither run nor train. Outputs that nobody reads
            take time, and get no gradient or zeros. Defaults to (0, 1, 2, 3).
        frozen_stages (int): 0 freezes the stem, and 1 to 4 also freeze so many stages
            with their norms: they get no gradients and stay in evaluation mode. -1
            freezes nothing. Defaults to -1.
        norm_eval (bool): Keep BatchNorm in evaluation mode while training.
            Defaults to False.
        with_cp (bool): Recompute the blocks in the backward pass to save memory.
            Defaults to False.
        token_mixer (dict, optional): Config of another token mixer in the place of the
            linear attention, see :class:`mlla_mm.models.layers.TokenMixer`. None takes
            :class:`mlla_mm.models.layers.MLLAAttention`. Defaults to None.
        init_cfg (dict | list[dict], optional): MMEngine's initialisation config.
            ``dict(type='Pretrained', checkpoint=PATH)`` reads official weights and
            ours. ``ema=True`` takes the averaged weights, ``ema=False`` the plain ones
            (see :class:`mlla_mm.checkpoints.pretrained.Pretrained`). None starts from
            scratch: linear layers from a truncated normal distribution with standard
            deviation 0.02 and bias 0, other layers from PyTorch's defaults.
            Defaults to None.

    Raises:
        ValueError: If an argument is not possible for a network.

    Examples:
        >>> import torch
        >>> from mlla_mm.models import MLLA
        >>> model = MLLA('tiny').eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 224, 224))]
        [(1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
    """

    arch_zoo = ARCH_ZOO

    def __init__(
        self,
        arch: Union[str, dict] = 'tiny',
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_indices: Union[int, Sequence[int]] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        token_mixer: Optional[dict] = None,
        init_cfg: Optional[Union[dict, List[dict]]] = None,
    ) -> None:
        size = parse_arch(arch, self.arch_zoo)
        check_rate('drop_rate', drop_rate)
        check_ratio('mlp_ratio', mlp_ratio, size.embed_dims)
        check_flags(qkv_bias=qkv_bias)

        def make_block(stage: int, drop_path_rate: float) -> MLLABlock:
            return MLLABlock(
                size.embed_dims * 2**stage,
                size.num_heads[stage],
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                token_mixer=token_mixer,
            )

        super().__init__(
            size,
            make_stem=lambda: Stem(in_channels, size.embed_dims, drop_rate),
            make_block=make_block,
            make_merging=PatchMerging,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
