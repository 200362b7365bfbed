# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections.abc import Callable, Sequence
from functools import partial
from typing import Dict, List, Optional, Tuple, Union

from mmengine.registry import MODELS
from torch import Tensor, nn

from ...arch import (
    NUM_STAGES,
    check_choice,
    check_flags,
    check_int,
    check_rate,
    check_ratio,
    parse_arch,
)
from ...ops.tracing import is_tracing
from ..layers import MambaBlock, PatchEmbed, SwinPatchMerging, TransformerBlock
from .staged import StagedBackbone

BLOCK_DESIGNS = ('transformer', 'sub', 'all')


@MODELS.register_module()
class LinearAttentionSwin(StagedBackbone):
    """Swin with linear attention: the baseline of the study of Mamba's designs.

    It is the network of Tables 1 and 2 of `Demystify Mamba in Vision: A Linear
    Attention Perspective <https://arxiv.org/abs/2405.16605>`_. By default it is the
    baseline: Swin-T with global linear attention, without windows and without any
    position encoding. Each design of Mamba is one argument. The authors have not
    released this part; docs/analysis.md says what is stated and what is chosen.

    Args:
        arch (str | dict): 'tiny' (or 't'), or a dict with ``embed_dims`` (int, number
            of channels of the first stage, doubled in each later one), ``depths`` and
            ``num_heads`` (four ints each). Defaults to 'tiny': 96, 2-2-6-2, 3-6-12-24.
        token_mixer (dict, optional): What mixes the tokens in each block, any
            registered :class:`mlla_mm.models.layers.TokenMixer`. The default type is
            :class:`mlla_mm.models.layers.LinearAttention`, whose switches are
            ``input_gate``, ``forget_gate``, ``shortcut``, ``normalization``,
            ``qk_head_dims``, ``lepe`` and ``rope``. Defaults to None.
        block_design (str): 'transformer', 'sub' (Mamba's block in the place of the
            attention, the MLP stays) or 'all' (Mamba's block alone).
            Defaults to 'transformer'.
        expansion (float): Channels inside Mamba's block, divided by those outside.
            Defaults to 1.
        ape (int | tuple[int, int], optional): Height and width of the images, for an
            absolute position embedding in each block: a table that is added to the
            mixer's input. It fits images of this size alone. Defaults to None.
        cpe (int): Conditional position encodings in each block, 3x3 depthwise
            convolutions before the mixer (1) and also before the MLP (2).
            Defaults to 0.
        in_channels (int): Number of image channels. Defaults to 3.
        mlp_ratio (float): Hidden channels of the MLPs, divided by their input channels.
            Defaults to 4.
        qkv_bias (bool): Whether the mixer's projections have a bias.
            Defaults to True.
        drop_rate (float): Dropout after the stem and in the MLPs, in [0, 1).
            Defaults to 0.
        drop_path_rate (float): Stochastic depth rate of the last block, in [0, 1). It
            rises linearly from 0. Defaults to 0.
        out_indices (int | Sequence[int]): Stages to return, 0 to 3.
            Defaults to (0, 1, 2, 3).
        frozen_stages (int): 0 freezes the stem, and 1 to 4 also freeze so many stages
            with their norms. -1 freezes nothing. Defaults to -1.
        norm_eval (bool): Keep BatchNorm in evaluation mode while training, if a token
            mixer has any. Defaults to False.
        with_cp (bool): Recompute the blocks in the backward pass to save memory.
            Defaults to False.
        init_cfg (dict | list[dict], optional): MMEngine's initialisation config.
            ``dict(type='Pretrained', checkpoint=PATH)`` reads checkpoints of this
            backbone, as in :class:`mlla_mm.models.MLLA`. Defaults to None.

    Raises:
        ValueError: If an argument is not possible for a network; or in the forward
            pass, if images have another size than ``ape`` says.

    Examples:
        >>> import torch
        >>> from mlla_mm.models import LinearAttentionSwin
        >>> model = LinearAttentionSwin(token_mixer=dict(input_gate=True)).eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 224, 224))]
        [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    """

    arch_zoo = dict.fromkeys(
        ['t', 'tiny'],
        dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    )

    def __init__(
        self,
        arch: Union[str, dict] = 'tiny',
        token_mixer: Optional[dict] = None,
        block_design: str = 'transformer',
        expansion: float = 1.0,
        ape: Optional[Union[int, Sequence[int]]] = None,
        cpe: int = 0,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_indices: Union[int, Sequence[int]] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Optional[Union[dict, List[dict]]] = None,
    ) -> None:
        size = parse_arch(arch, self.arch_zoo)
        check_choice('block_design', block_design, BLOCK_DESIGNS)
        check_int('cpe', cpe, 0, 2)
        check_rate('drop_rate', drop_rate)
        check_ratio('mlp_ratio', mlp_ratio, size.embed_dims)
        check_flags(qkv_bias=qkv_bias)
        if block_design != 'transformer':
            check_ratio('expansion', expansion, size.embed_dims)
        elif expansion != 1:
            raise ValueError(
                f"expansion = {expansion!r} is for Mamba's block. Leave it out, or set "
                "block_design to 'sub' or 'all'."
            )
        designs: Dict[str, Callable[..., nn.Module]] = {
            'transformer': partial(TransformerBlock, mlp_ratio=mlp_ratio),
            'sub': partial(MambaBlock, mlp_ratio=mlp_ratio, expansion=expansion),
            'all': partial(MambaBlock, mlp_ratio=0, expansion=expansion),
        }
        map_sizes = _map_sizes(ape)

        def make_block(stage: int, drop_path_rate: float) -> nn.Module:
            return designs[block_design](
                size.embed_dims * 2**stage,
                size.num_heads[stage],
                token_mixer=token_mixer,
                qkv_bias=qkv_bias,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                ape=map_sizes[stage],
                cpe=cpe,
            )

        super().__init__(
            size,
            make_stem=lambda: PatchEmbed(in_channels, size.embed_dims, drop_rate),
            make_block=make_block,
            make_merging=SwinPatchMerging,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.ape = ape
        self._map_sizes = map_sizes

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if self.ape is None or is_tracing():
            return
        if _map_sizes(x.shape[2:]) != self._map_sizes:
            height, width = x.shape[2:]
            raise ValueError(
                f'The absolute position embedding is for images of the size ape = '
                f'{self.ape}, and these have {height} x {width} pixels. Resize them, '
                'or train with another ape.'
            )


def _map_sizes(
    image: Optional[Union[int, Sequence[int]]],
) -> List[Optional[Tuple[int, int]]]:
    """Height and width of each stage's maps, for images of a size."""
    if image is None:
        return [None] * NUM_STAGES
    sides = image if isinstance(image, (list, tuple)) else (image, image)
    if len(sides) != 2:
        raise ValueError(f'ape must be an image size, one or two ints, got {image!r}.')
    for side in sides:
        check_int('ape', side, 1)
    height, width = sides
    # Each stage rounds up, the first from a quarter.
    strides = [2**i for i in range(2, NUM_STAGES + 2)]
    return [(-(-height // stride), -(-width // stride)) for stride in strides]
