# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds out whether what follows a backbone of ours can read its outputs."""

import inspect
from collections.abc import Mapping
from typing import Any, List, NamedTuple, Optional

from mmengine.config import Config
from mmengine.registry import MODELS

from ..arch import parse_arch
from ..engine.arguments import ArgumentError, named_arguments, require_arguments
from ..engine.parts import named_parts, value_at
from ..models.backbones import MLLA, LinearAttentionSwin
from ..models.backbones.staged import StagedBackbone
from .kinds import class_of

# Necks whose in_channels are the channels of all maps of the backbone.
_NECKS = ('FPN', 'PAFPN', 'BFP', 'ChannelMapper', 'NASFPN', 'FPN_CARAFE')
# What follows such a neck, by the keys that hold its out_channels.
_BEHIND_NECK = (
    'rpn_head.in_channels',
    'bbox_head.in_channels',
    'roi_head.bbox_roi_extractor.out_channels',
    'roi_head.mask_roi_extractor.out_channels',
)


class _Outputs(NamedTuple):
    """Channels of the maps that a part of the model gives, and a name of the part."""

    channels: List[int]
    source: str


def check_outputs(model: Mapping) -> None:
    """Compare a backbone's arguments and channels with what follows it.

    Backbones are :class:`MLLA` and :class:`LinearAttentionSwin`. Of others that derive
    from them or from :class:`StagedBackbone`, the names of the arguments are compared.

    Args:
        model (Mapping): The config of a model, whose default scope is the current one.

    Raises:
        ValueError: Names the key of the first mistake, and what is right.
    """
    outputs = _backbone_outputs(model.get('backbone'))
    if outputs is None:
        return
    neck, head = model.get('neck'), model.get('head')
    kind = neck.get('type') if isinstance(neck, Mapping) else None
    if isinstance(neck, Mapping) and kind in _NECKS:
        _expect(neck.get('in_channels'), outputs, 'model.neck.in_channels')
        width = neck.get('out_channels')
        for path in _BEHIND_NECK:
            value = value_at(model, path)
            if isinstance(value, int) and isinstance(width, int):
                _expect(
                    [value],
                    _Outputs([width], f"{kind}'s out_channels"),
                    f'model.{path}',
                )
    elif isinstance(head, Mapping) and (neck is None or kind == 'GlobalAveragePooling'):
        last = outputs._replace(channels=outputs.channels[-1:])
        _expect(_as_list(head.get('in_channels')), last, 'model.head.in_channels')
    if neck is None:
        for key in ('decode_head', 'auxiliary_head'):
            for path, part in named_parts(model.get(key), f'model.{key}'):
                _check_decode_head(part, outputs, path)


def _backbone_outputs(backbone: Any) -> Optional[_Outputs]:
    """What a backbone of ours gives, None for others. Checks its arguments."""
    if not isinstance(backbone, Mapping):
        return None
    kind = class_of(MODELS, backbone.get('type'))
    if not (inspect.isclass(kind) and issubclass(kind, StagedBackbone)):
        return None
    options = {k: v for k, v in backbone.items() if k not in ('type', 'init_cfg')}
    require_arguments(kind, options, 'model.backbone')
    if kind not in (MLLA, LinearAttentionSwin):
        return None
    arch = options.get('arch', 'tiny')
    cfg = Config(dict(model=dict(backbone=backbone)))
    try:
        embed_dims, _, num_heads = parse_arch(arch, kind.arch_zoo)
        # As wide as the network and a block deep, which makes its own checks fast.
        shallow = dict(embed_dims=embed_dims, depths=(1,) * 4, num_heads=num_heads)
        with named_arguments(cfg):
            indices = kind(**dict(options, arch=shallow)).out_indices
    except ArgumentError:
        raise  # names the key of a part, such as the token mixer's
    except (KeyError, TypeError, ValueError) as error:
        # The text of a KeyError has quotation marks around it.
        text = error.args[0] if error.args else type(error).__name__
        raise ValueError(f'model.backbone: {text}') from error
    name = f"arch '{arch}'" if isinstance(arch, str) else f'embed_dims {embed_dims}'
    return _Outputs(
        [embed_dims * 2**i for i in indices],
        f'{kind.__name__} of {name}, out_indices {indices}',
    )


def _check_decode_head(head: Mapping, outputs: _Outputs, path: str) -> None:
    index, channels = head.get('in_index', -1), head.get('in_channels')
    indices = _as_list(index)
    count = len(outputs.channels)
    if not all(isinstance(i, int) and -count <= i < count for i in indices):
        raise ValueError(
            f'{path}.in_index is {index}, but the backbone gives {count} '
            f'{"maps" if count > 1 else "map"} ({outputs.source}).'
        )
    if isinstance(index, int):
        # Heads that take a list without indices, such as Mask2Former's, read all maps.
        channels = [channels] if isinstance(channels, int) else None
    chosen = outputs._replace(channels=[outputs.channels[i] for i in indices])
    _expect(channels, chosen, f'{path}.in_channels')


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


def _expect(channels: Any, outputs: _Outputs, path: str) -> None:
    """Compare a list of channels with what comes in. Other values are not compared."""
    if isinstance(channels, (list, tuple)) and list(channels) != outputs.channels:
        shown, right = (
            x[0] if len(x) == 1 else list(x) for x in (channels, outputs.channels)
        )
        raise ValueError(
            f'{path} is {shown}, but what comes in has {right} channels '
            f'({outputs.source}).'
        )
