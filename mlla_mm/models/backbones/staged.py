# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections.abc import Iterator, Sequence
from typing import Any, Callable, List, Optional, Tuple, Union

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import ops
from ...arch import (
    NUM_STAGES,
    Arch,
    check_flags,
    check_int,
    check_rate,
    parse_out_indices,
)
from ...compat.pytorch import BatchNorm, does_more_when_called
from ...ops.tracing import is_graph
from ..layers import MLP, ConvLayer, MLLAAttention, MLLABlock, PatchMerging, Stem

# Parts that call their layers by the ops, and containers.
_PARTS = (ConvLayer, MLLAAttention, MLLABlock, MLP, PatchMerging, Stem)
_CONTAINERS = (nn.ModuleList, nn.Sequential)


class Stage(nn.Module):
    """Blocks at one resolution, followed by patch merging except in the last stage.

    Args:
        blocks (Sequence[nn.Module]): Blocks, (N, H, W, C) to the same shape.
        downsample (nn.Module, optional): The patch merging, (N, C, H, W) to
            (N, 2C, ceil(H / 2), ceil(W / 2)).
        with_cp (bool): Recompute the blocks in the backward pass. The patch merging is
            not recomputed, because that would update its BatchNorm twice.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: Optional[nn.Module],
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C), without the patch merging."""
        for block in self.blocks:
            if self.with_cp and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class StagedBackbone(BaseModule):
    """A stem at stride 4, four stages, and a LayerNorm for each output.

    Parameters have the names ``patch_embed.*``, ``layers.STAGE.blocks.BLOCK.*``,
    ``layers.STAGE.downsample.*`` and ``normSTAGE.*``. Linear layers start from a
    truncated normal distribution with standard deviation 0.02 and bias 0. Parts that
    have a method ``init_weights`` start as it says, and others as PyTorch's.

    Args:
        arch (Arch): Channels of the first stage, which double in each later one, and
            blocks and heads of each stage.
        make_stem (Callable[[], nn.Module]): Makes the stem, (N, in_channels, H, W) to
            (N, C, ceil(H / 4), ceil(W / 4)).
        make_block (Callable[[int, float], nn.Module]): Makes a block from the number of
            its stage and its stochastic depth rate, (N, H, W, C) to the same shape.
        make_merging (Callable[[int], nn.Module]): Makes the patch merging of a number
            of channels d, (N, d, H, W) to (N, 2d, ceil(H / 2), ceil(W / 2)).
        in_channels (int): Number of image channels.
        drop_path_rate (float): Stochastic depth rate of the last block, in [0, 1). It
            rises linearly from 0.
        out_indices (int | Sequence[int]): Stages to return.
        frozen_stages (int): 0 freezes the stem, 1 to 4 also so many stages.
        norm_eval (bool): Keep BatchNorm in evaluation mode while training.
        with_cp (bool): Recompute the blocks in the backward pass.
        init_cfg (dict | list[dict], optional): MMEngine's initialisation config.

    Raises:
        ValueError: If an argument is impossible.
    """

    num_stages = NUM_STAGES
    # An nn.ModuleList of Stage. Its own type would tell nothing about its items.
    layers: Any

    def __init__(
        self,
        arch: Arch,
        make_stem: Callable[[], nn.Module],
        make_block: Callable[[int, float], nn.Module],
        make_merging: Callable[[int], nn.Module],
        in_channels: int,
        drop_path_rate: float,
        out_indices: Union[int, Sequence[int]],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: Optional[Union[dict, List[dict]]],
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        check_int('in_channels', in_channels, 1)
        check_rate('drop_path_rate', drop_path_rate)
        check_int('frozen_stages', frozen_stages, -1, NUM_STAGES)
        check_flags(norm_eval=norm_eval, with_cp=with_cp)
        self.in_channels = in_channels
        self.out_indices = parse_out_indices(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = [arch.embed_dims * 2**i for i in range(NUM_STAGES)]

        self.patch_embed = make_stem()
        rates = torch.linspace(
            0, drop_path_rate, sum(arch.depths), dtype=torch.float64, device='cpu'
        ).split(list(arch.depths))
        self.layers = nn.ModuleList(
            Stage(
                [make_block(i, rate) for rate in rates[i].tolist()],
                make_merging(self.num_features[i]) if i < NUM_STAGES - 1 else None,
                with_cp,
            )
            for i in range(NUM_STAGES)
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(self.num_features[i]))

        self.apply(self._init_part)
        # Maps and gradients are channels-last. DistributedDataParallel lays out its
        # buckets for gradients like the weights. self.to() would fail for fake tensors,
        # because it swaps them for new ones.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                weight.data = weight.data.to(memory_format=torch.channels_last)
        self._freeze_stages()
        self._freeze_unused()

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of the stages in ``out_indices``.

        Args:
            x (Tensor): Images (N, in_channels, H, W), with any H and W from 1.

        Returns:
            tuple[Tensor]: For each output stage i, a map (N, C * 2**i, H_i, W_i). H_0
            is H / 4 rounded up, and H_(i+1) is H_i / 2 rounded up.

        Raises:
            ValueError: If ``x`` is empty, has another shape or is not floating-point.
                In the training of an MLLA also for a single image of at most 32 x 32
                pixels: BatchNorm would get one value per channel, which has no
                variance.
        """
        self.check_input(x)
        with ops.cast_once(self._find_layers, x):
            return self._forward(x)

    def _find_layers(self) -> Iterator[nn.Module]:
        """The layers that the ops may read, except the output norms."""
        for part in (self.patch_embed, *self.layers[: self.out_indices[-1] + 1]):
            yield from _find_layers(part)

    def _forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        # From here on maps are (N, H, W, C) in memory. Linear layers and LayerNorm work
        # on the last axis, and convolutions see a channels-last tensor.
        x = self.patch_embed(x).permute(0, 2, 3, 1).contiguous()
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
            if i == self.out_indices[-1]:
                break
            x = stage.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        norms = [getattr(self, f'norm{i}') for i in self.out_indices]
        outs = map(ops.layer_norm, _read_together(maps, norms), norms)
        # mmcv's compiled RoIAlign takes maps for contiguous without a check.
        return tuple(out.permute(0, 3, 1, 2).contiguous() for out in outs)

    def init_weights(self) -> None:
        """Initialise MMEngine's modules in blocks, too, and then apply ``init_cfg``."""
        # MMEngine looks for them among a module's children alone.
        for module in self.layers.modules():
            if isinstance(module, BaseModule) and not module.is_init:
                module.init_weights()
        super().init_weights()

    def train(self, mode: bool = True) -> 'StagedBackbone':
        """Set training mode, unless ``frozen_stages`` or ``norm_eval`` forbid it."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter, for layer-wise learning-rate decay.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): The part of the name before the backbone's own names, such as
                'backbone.'. Defaults to ''.

        Returns:
            tuple[int, int]: The depth, and the number of depths. The stem has depth 0,
            and the blocks have 1, 2 and so on. Patch merging has the depth of the block
            before it. Output norms and heads have the last depth.
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

    def _init_part(self, module: nn.Module) -> None:
        """Initialise a module whose children have been initialised."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        # MMEngine initialises its own modules later.
        elif hasattr(module, 'init_weights') and not isinstance(module, BaseModule):
            part: Any = module
            part.init_weights()

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
        """Freeze what never runs: DistributedDataParallel would wait for gradients."""
        last = self.out_indices[-1]
        if last < NUM_STAGES - 1:
            self.layers[last].downsample.requires_grad_(False)
            self.layers[last + 1 :].requires_grad_(False)

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError unless ``x`` is what :meth:`forward` takes."""
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


def _find_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a module that the ops may read in a forward pass.

    What is within another type, or within a module with hooks, is left out: calling
    that may change weights. So are blocks that the backward pass calls again, when the
    casts of the forward pass are gone: both calls must do the same.
    """
    if type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm):
        yield module
    elif type(module) in (Stage, *_PARTS, *_CONTAINERS) and not does_more_when_called(
        module
    ):
        for name, child in module.named_children():
            again = name == 'blocks' and module.with_cp and torch.is_grad_enabled()
            if not again:
                yield from _find_layers(child)


def _read_together(maps: List[Tensor], norms: List[nn.Module]) -> Sequence[Tensor]:
    """The maps, such that a backward pass from any reaches all maps and norms.

    DistributedDataParallel waits until it has reached each parameter, also those behind
    outputs that nobody reads.
    """
    # A compiled graph has one backward pass anyway.
    if len(maps) == 1 or not torch.is_grad_enabled() or is_graph():
        return maps
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    return _ReadTogether.apply(len(maps), *maps, *parameters)


class _ReadTogether(torch.autograd.Function):
    """The first ``count`` tensors. Gradients stay as they are, None where unread."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> Tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.num_others = len(inputs) - 1 - len(output)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        return (None, *grads, *[None] * ctx.num_others)
