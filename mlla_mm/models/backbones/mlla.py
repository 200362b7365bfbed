# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections.abc import Sequence
from math import inf
from typing import Dict, List, Optional, Tuple, Union

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ...ops.tracing import is_tracing
from ...utils.allocator import keep_freed_memory
from ...utils.compat import require_compiler
from ..layers import LayerNorm, MLLABlock, PatchMerging, Stem
from ..weights import load_pretrained


class Stage(nn.Module):
    """A run of blocks at one resolution, then patch merging unless it is the last.

    Args:
        embed_dims (int): Number of channels of the blocks.
        num_heads (int): Number of attention heads.
        drop_path_rates (Sequence[float]): Stochastic depth rate of each block.
        downsample (bool): Whether patch merging follows.
        with_cp (bool): Recompute the blocks in the backward pass. The patch merging is
            left out: recomputing it would update its BatchNorm twice.
        **block_cfg: Further arguments of :class:`MLLABlock`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        drop_path_rates: Sequence[float],
        downsample: bool,
        with_cp: bool,
        **block_cfg,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(
            MLLABlock(embed_dims, num_heads, drop_path_rate=rate, **block_cfg)
            for rate in drop_path_rates
        )
        self.downsample = PatchMerging(embed_dims) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C), without the patch merging."""
        for block in self.blocks:
            if self.with_cp and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


@MODELS.register_module()
class MLLA(BaseModule):
    """MLLA: a linear-attention vision backbone with Mamba's block design.

    A convolutional stem at stride 4, four stages of :class:`MLLABlock` joined by
    :class:`PatchMerging`, and a LayerNorm per output. Implements `Demystify Mamba in
    Vision: A Linear Attention Perspective <https://arxiv.org/abs/2405.16605>`_ (the
    model is called MILA in the final paper). Parameter names are those of the official
    checkpoints.

    Attention is global: padding an image changes its features everywhere.

    Args:
        arch (str | dict): 'tiny', 'small' or 'base' (or 't', 's', 'b'), or a dict with
            ``embed_dims`` (int, channels of the first stage, doubled by each next one),
            ``depths`` and ``num_heads`` (four ints each). Defaults to 'tiny'.
        in_channels (int): Number of image channels. Defaults to 3.
        mlp_ratio (float): Hidden channels of the MLPs over their input channels.
            Defaults to 4.
        qkv_bias (bool): Whether the query-key projections have a bias.
            Defaults to True.
        drop_rate (float): Dropout after the stem and in the MLPs, in [0, 1).
            Defaults to 0.
        drop_path_rate (float): Stochastic depth rate of the last block, in [0, 1); it
            rises linearly from 0 over all blocks. Defaults to 0.
        out_indices (int | Sequence[int]): Stages to return, 0 to 3; negative ones count
            from the end. Stages behind the last output are kept, so that checkpoints
            fit, but neither run nor trained. Defaults to (0, 1, 2, 3).
        frozen_stages (int): Freeze the stem (0), or the stem and the first
            ``frozen_stages`` stages with their norms: no gradient, evaluation mode.
            -1 freezes nothing. Defaults to -1.
        norm_eval (bool): Keep BatchNorm in evaluation mode while training.
            Defaults to False.
        with_cp (bool): Recompute the blocks in the backward pass to save memory.
            Defaults to False.
        compile (bool | dict): Whether to run the forward pass through
            ``torch.compile``, or the keyword arguments for it. The first call compiles
            for its image size, the first call with another one for all sizes; so do
            training and evaluation, and a copy of the model, each for itself. Needs
            PyTorch 2.2 or newer.
            Defaults to False.
        init_cfg (dict | list[dict], optional): MMEngine's initialisation config.
            ``dict(type='Pretrained', checkpoint=PATH)`` reads the official weights and
            ours; with ``ema=True`` the averaged ones, with ``ema=False`` the plain ones
            (see :func:`mlla_mm.models.load_pretrained`). None starts from scratch:
            linear layers truncated normal with std 0.02 and bias 0, the others
            PyTorch's defaults. Defaults to None.

    Raises:
        ValueError: If an argument does not describe a network.

    Examples:
        >>> import torch
        >>> from mlla_mm.models import MLLA
        >>> model = MLLA('tiny').eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 224, 224))]
        [(1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
    """

    arch_zoo: Dict[str, dict] = {
        **dict.fromkeys(
            ['t', 'tiny'],
            dict(embed_dims=64, depths=(2, 4, 8, 4), num_heads=(2, 4, 8, 16)),
        ),
        **dict.fromkeys(
            ['s', 'small'],
            dict(embed_dims=64, depths=(3, 6, 21, 6), num_heads=(2, 4, 8, 16)),
        ),
        **dict.fromkeys(
            ['b', 'base'],
            dict(embed_dims=96, depths=(3, 6, 21, 6), num_heads=(3, 6, 12, 24)),
        ),
    }
    num_stages = 4

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
        compile: Union[bool, dict] = False,
        init_cfg: Optional[Union[dict, List[dict]]] = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        embed_dims, depths, num_heads = self._parse_arch(arch)
        _check_int('in_channels', in_channels, 1)
        _check_int('frozen_stages', frozen_stages, -1, self.num_stages)
        _check_rate('drop_rate', drop_rate)
        _check_rate('drop_path_rate', drop_path_rate)
        if not _is_number(mlp_ratio) or not 1 <= embed_dims * mlp_ratio < inf:
            raise ValueError(
                'mlp_ratio must be a number that gives the MLPs at least one hidden '
                f'channel, got {mlp_ratio!r}.'
            )
        _check_flags(qkv_bias=qkv_bias, norm_eval=norm_eval, with_cp=with_cp)
        self.in_channels = in_channels
        self.out_indices = self._parse_out_indices(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = [embed_dims * 2**i for i in range(self.num_stages)]

        self.patch_embed = Stem(in_channels, embed_dims, drop_rate)
        rates = torch.linspace(0, drop_path_rate, sum(depths), dtype=torch.float64)
        rates = rates.split(list(depths))
        self.layers = nn.ModuleList(
            Stage(
                self.num_features[i],
                num_heads[i],
                drop_path_rates=rates[i].tolist(),
                downsample=i < self.num_stages - 1,
                with_cp=with_cp,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_rate=drop_rate,
            )
            for i in range(self.num_stages)
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm(self.num_features[i]))

        keep_freed_memory()
        self.apply(_init_linear)
        # The layout of the maps, in which the gradients come: DistributedDataParallel
        # lays out its buckets as the weights are.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight.data
                module.weight.data = weight.to(memory_format=torch.channels_last)
        self._freeze_stages()
        self._freeze_unused()
        if not isinstance(compile, (bool, dict)):
            raise ValueError(
                'compile must be True, False or a dict of arguments for torch.compile, '
                f'got {compile!r}.'
            )
        if compile is not False:
            require_compiler('compile')
        self._compile_options = {} if compile is True else compile
        self._compile()

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of the stages in ``out_indices``.

        Args:
            x (Tensor): Images (N, in_channels, H, W), any H, W >= 1.

        Returns:
            tuple[Tensor]: For each output stage i (N, C * 2**i, H_i, W_i), where H_0 is
            H / 4 rounded up and H_(i+1) is H_i / 2 rounded up.

        Raises:
            ValueError: If ``x`` is empty, of another shape or no floating-point
                tensor. In training also for a single image of at most 32 x 32 pixels:
                BatchNorm has no variance of the one value per channel that it gets.
        """
        self._check_input(x)
        # From here on maps are (N, H, W, C) in memory: linear layers and LayerNorm act
        # on the last axis, and convolutions see a channels-last tensor.
        x = self.patch_embed(x).permute(0, 2, 3, 1).contiguous()
        outs = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x)
                # Contiguous, as mmcv's compiled RoIAlign reads it without a check.
                outs.append(out.permute(0, 3, 1, 2).contiguous())
            if i == self.out_indices[-1]:
                break
            x = stage.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return tuple(outs)

    def __call__(self, *args, **kwargs) -> Tuple[Tensor, ...]:
        if is_tracing():
            # A compiled function cannot be traced, counted or exported.
            return self._call_impl(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._compile()  # which a copy has not inherited

    def train(self, mode: bool = True) -> 'MLLA':
        """Set training mode, but for what ``frozen_stages`` and ``norm_eval`` hold."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for layer-wise learning-rate decay.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): What its name has before the backbone's own names, as in
                'backbone.'. Defaults to ''.

        Returns:
            tuple[int, int]: The depth, and the number of depths. The stem has depth 0
            and the blocks 1, 2, ...; patch merging goes with the block before it.
            Output norms and what comes after the backbone have the last depth.
        """
        blocks = [len(stage.blocks) for stage in self.layers]
        num_depths = sum(blocks) + 2
        if param_name.startswith(f'{prefix}patch_embed.'):
            return 0, num_depths
        if not param_name.startswith(f'{prefix}layers.'):
            return num_depths - 1, num_depths
        # STAGE.blocks.BLOCK.… or STAGE.downsample.…
        stage, module, block = param_name[len(f'{prefix}layers.') :].split('.')[:3]
        in_stage = int(block) + 1 if module == 'blocks' else blocks[int(stage)]
        return sum(blocks[: int(stage)]) + in_stage, num_depths

    def compile(self, *args, **kwargs) -> None:
        """Run the forward pass through ``torch.compile``, with these arguments for it.

        Unless a ``mode`` or another ``backend`` is asked for, layouts are left alone:
        the compiler would choose one for the convolutions, whose maps have it, and
        cannot for the gradients where image sizes vary (PyTorch 2.11).
        """
        backend = kwargs.get('backend', 'inductor')
        if kwargs.get('mode') is None and backend == 'inductor':
            options = kwargs.get('options') or {}
            kwargs['options'] = {'layout_optimization': False, **options}
        super().compile(*args, **kwargs)

    def init_weights(self) -> None:
        """Load the pretrained weights that ``init_cfg`` names, if it does."""
        if isinstance(self.init_cfg, dict) and self.init_cfg['type'] == 'Pretrained':
            load_pretrained(
                self, **{k: v for k, v in self.init_cfg.items() if k != 'type'}
            )
            self._is_init = True
        else:
            super().init_weights()

    def _compile(self) -> None:
        if self._compile_options is not False:
            self.compile(**self._compile_options)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed, *self.layers[: self.frozen_stages]]
        frozen += [
            getattr(self, f'norm{i}')
            for i in self.out_indices
            if i < self.frozen_stages
        ]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def _freeze_unused(self) -> None:
        """Spare DistributedDataParallel parameters that never get a gradient."""
        last = self.out_indices[-1]
        if last < self.num_stages - 1:
            self.layers[last].downsample.requires_grad_(False)
            self.layers[last + 1 :].requires_grad_(False)

    @classmethod
    def _parse_arch(
        cls, arch: Union[str, dict]
    ) -> Tuple[int, Tuple[int, ...], Tuple[int, ...]]:
        if isinstance(arch, str):
            if arch.lower() not in cls.arch_zoo:
                raise ValueError(
                    f"Unknown arch '{arch}': choose from {sorted(cls.arch_zoo)}, or "
                    'give a dict with embed_dims, depths and num_heads.'
                )
            arch = cls.arch_zoo[arch.lower()]
        keys = {'embed_dims', 'depths', 'num_heads'}
        if not isinstance(arch, dict) or set(arch) != keys:
            raise ValueError(
                'arch must be a name or a dict with exactly the keys embed_dims, '
                f'depths and num_heads, got {arch!r}.'
            )
        embed_dims = arch['embed_dims']
        if not _is_int(embed_dims) or embed_dims < 4 or embed_dims % 4:
            raise ValueError(
                'embed_dims must be a positive multiple of 4 (the rotary embedding '
                f'pairs channels on two axes), got {embed_dims!r}.'
            )
        for key in ('depths', 'num_heads'):
            values = arch[key]
            if not _is_int_sequence(values) or len(values) != cls.num_stages:
                raise ValueError(f'{key} must be four ints, got {values!r}.')
            if min(values) < 1:
                raise ValueError(f'{key} must be positive, got {values!r}.')
        for i, heads in enumerate(arch['num_heads']):
            if embed_dims * 2**i % heads:
                raise ValueError(
                    f'num_heads[{i}] = {heads} does not divide the '
                    f'{embed_dims * 2**i} channels of stage {i}.'
                )
        return embed_dims, tuple(arch['depths']), tuple(arch['num_heads'])

    @classmethod
    def _parse_out_indices(
        cls, out_indices: Union[int, Sequence[int]]
    ) -> Tuple[int, ...]:
        indices = [out_indices] if _is_int(out_indices) else out_indices
        if not _is_int_sequence(indices) or not indices:
            raise ValueError(f'out_indices must be one or more ints, got {indices!r}.')
        if not all(-cls.num_stages <= i < cls.num_stages for i in indices):
            raise ValueError(
                f'out_indices must lie between 0 and {cls.num_stages - 1}, or '
                f'-{cls.num_stages} and -1, got {indices!r}.'
            )
        stages = sorted({i % cls.num_stages for i in indices})
        if len(stages) != len(indices):
            raise ValueError(f'out_indices names a stage twice: {indices!r}.')
        return tuple(stages)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.numel() == 0:
            raise ValueError(
                f'Expected non-empty images (N, {self.in_channels}, H, W), '
                f'got a tensor of shape {tuple(x.shape)}.'
            )
        if not x.is_floating_point():
            raise ValueError(
                f'Expected images of floating-point numbers, got {x.dtype}. '
                'Normalise them first.'
            )


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_int_sequence(values) -> bool:
    return isinstance(values, (list, tuple)) and all(map(_is_int, values))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: int, low: int, high: float = inf) -> None:
    if not _is_int(value) or not low <= value <= high:
        bounds = f'of at least {low}' if high == inf else f'from {low} to {high}'
        raise ValueError(f'{name} must be an int {bounds}, got {value!r}.')


def _check_rate(name: str, value: float) -> None:
    # What is kept is divided by 1 - rate.
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f'{name} must be a number of at least 0 and below 1, got {value!r}.'
        )


def _check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}.')
