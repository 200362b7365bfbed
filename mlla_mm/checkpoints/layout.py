# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The layouts of checkpoints: where their weights are, and how they are named."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from operator import methodcaller
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

from torch import Tensor

from ..arch import name_size
from ..compat.pytorch import METADATA
from ..utils.text import printable
from .reader import CheckpointError

EMA_KEY = 'state_dict_ema'
"""The key of the averaged weights in a checkpoint of the authors or of this package."""
SWAPPED_KEY = 'ema_state_dict'
"""The key of the plain weights in a checkpoint of MMEngine's EMAHook.

The hook saves the averaged weights under ``state_dict``, where MMEngine finds them. The
plain ones have ``module.`` before their names.
"""

_PLAIN_KEYS = ('state_dict', 'model')
# The output projection of a block, whatever its token mixer is. Networks of OpenMMLab
# and torchvision have no such names: Swin has 'attn.proj'. One digit keeps the number
# of stages, which is the highest one plus one, small.
_BLOCK = re.compile(
    r'^(?P<prefix>.*?)layers\.(?P<stage>[0-9])\.blocks\.\d+\.(out_)?proj\.weight$'
)
# The authors' files contain rotation tables, which can be computed.
_ROTATIONS = re.compile(r'\.rope\.rotations$')
# Names in the authors' classifier, which has no prefix, and in ours.
_CLASSIFIER_NAMES = {'norm.': 'backbone.norm3.', 'head.': 'head.fc.'}
_TASKS = {
    'detector': ('rpn_head.', 'roi_head.', 'bbox_head.'),
    'segmentor': ('decode_head.',),
    'classifier': ('head.',),
}


class Network(NamedTuple):
    """A network of this package, as names and shapes of its weights describe it.

    Attributes:
        kind (str): 'MLLA' or 'LinearAttentionSwin'.
        prefix (str): Text before the backbone's own names, '' or 'backbone.'.
        embed_dims (int): Channels of the first stage.
        depths (tuple[int]): Blocks of each stage.
        task (str): 'detector', 'segmentor', 'classifier' or 'backbone'.
    """

    kind: str
    prefix: str
    embed_dims: int
    depths: Tuple[int, ...]
    task: str

    @property
    def size(self) -> Optional[str]:
        """'t', 's' or 'b' if this is a published MLLA, else None."""
        is_mlla = self.kind == 'MLLA'
        return name_size(self.embed_dims, self.depths) if is_mlla else None

    def __str__(self) -> str:
        depths = '-'.join(map(str, self.depths))
        article = 'an' if self.kind == 'MLLA' else 'a'
        name = f'MLLA-{self.size.upper()}' if self.size else f'{article} {self.kind}'
        return f'{name} (embed_dims {self.embed_dims}, depths {depths})'


def describe(weights: Mapping[str, Tensor]) -> Optional[Network]:
    """Recognise a network of this package. Return None for other weights."""
    blocks = [match for match in map(_BLOCK.match, weights) if match]
    if not blocks or weights[blocks[0].string].dim() != 2:
        return None
    stages = [int(block['stage']) for block in blocks]
    tasks = [
        task
        for task, prefixes in _TASKS.items()
        if any(key.startswith(prefixes) for key in weights)
    ]
    prefix = blocks[0]['prefix']
    return Network(
        # MLLA's stem has several convolutions.
        kind='LinearAttentionSwin'
        if f'{prefix}patch_embed.proj.weight' in weights
        else 'MLLA',
        prefix=prefix,
        # Each stage has twice the channels of the one before.
        embed_dims=weights[blocks[0].string].shape[0] >> stages[0],
        depths=tuple(stages.count(stage) for stage in range(max(stages) + 1)),
        task=tasks[0] if tasks else 'backbone',
    )


def find_weights(
    checkpoint: Any, source: str, ema: Optional[bool] = None
) -> Mapping[str, Tensor]:
    """Find the weights in a checkpoint.

    OpenMMLab and this package save them under ``state_dict``, the authors' classifiers
    under ``model``, and others at the top level. Averaged weights are under
    ``state_dict_ema``; in a checkpoint of MMEngine's EMAHook they are under
    ``state_dict``, and the plain ones under ``ema_state_dict``.

    Args:
        checkpoint (Any): Content of the file.
        source (str): Name of the file, for errors.
        ema (bool, optional): True takes the averaged weights, False the plain ones.
            None takes what MMEngine evaluates: the average in a checkpoint of its
            EMAHook, else the plain weights. Defaults to None.

    Returns:
        Mapping[str, Tensor]: Weights by name.

    Raises:
        CheckpointError: If there are no such weights.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    if ema:
        require_average(content, source)
    if ema is False and isinstance(content.get(SWAPPED_KEY), Mapping):
        weights = _plain_of_swapped(content)
    else:
        keys = (EMA_KEY, *_PLAIN_KEYS) if ema else _PLAIN_KEYS
        found = [content[key] for key in keys if isinstance(content.get(key), Mapping)]
        weights = found[0] if found else content
    are_tensors = all(isinstance(value, Tensor) for value in weights.values())
    if not weights or not are_tensors or not has_names(weights):
        raise CheckpointError(
            f'{source} holds no weights: expected them at the top level, or under '
            "'model' or 'state_dict'."
        )
    return weights


def require_average(checkpoint: Mapping, source: str) -> None:
    """Require a checkpoint to hold averaged weights.

    Args:
        checkpoint (Mapping): Content of the file.
        source (str): Name of the file, for the error.

    Raises:
        CheckpointError: If there are none.
    """
    keys = (EMA_KEY, SWAPPED_KEY)
    if not any(isinstance(checkpoint.get(key), Mapping) for key in keys):
        raise CheckpointError(
            f"{source} holds no averaged weights: neither '{EMA_KEY}', of MESAHook, "
            f"nor '{SWAPPED_KEY}', of MMEngine's EMAHook. Take the weights that it "
            'has, without --ema or ema=True.'
        )


def class_names(checkpoint: Any) -> Tuple[str, ...]:
    """Names of the classes that a checkpoint notes, as printable text; or none."""
    classes = dataset_meta(checkpoint).get('classes')
    return tuple(map(printable, classes if isinstance(classes, (list, tuple)) else ()))


def dataset_meta(checkpoint: Any) -> Dict[str, Any]:
    """What a checkpoint notes of its data set, by names in small letters.

    MMEngine writes a dict of it. mmdet 2.x, mmseg 0.x and mmcls wrote no dict.
    """
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    found = meta.get('dataset_meta')
    found = found if isinstance(found, Mapping) and found else meta
    return {str(key).lower(): value for key, value in found.items()}


def has_names(weights: Any) -> bool:
    """Whether a value is a mapping and all its keys are printable text."""
    return isinstance(weights, Mapping) and all(
        isinstance(key, str) and key.isprintable() for key in weights
    )


def to_own_names(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give weights the names that they have in this package.

    The prefix ``module.`` of distributed training and the rotation tables are removed.
    In the authors' classifier, ``norm`` becomes ``backbone.norm3``, ``head`` becomes
    ``head.fc``, and other names get ``backbone.`` in front. Their detectors and
    segmentors have our names already.

    Args:
        weights (Mapping[str, Tensor]): Weights by name. They are not changed.

    Returns:
        Mapping[str, Tensor]: The same tensors by their new names. Those of another
        network lose ``module.`` alone.
    """
    result = without_module(weights)
    network = describe(result)
    if network is None:
        return result
    result = OrderedDict(
        (key, value) for key, value in result.items() if not _ROTATIONS.search(key)
    )
    if 'backbone.head.weight' in result:
        result = _renamed(result, methodcaller('removeprefix', 'backbone.'))
        network = describe(result)
    if network and not network.prefix and network.task == 'classifier':
        result = _renamed(result, _to_own_classifier)
    return with_metadata(result, weights)


def without_module(weights: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
    """Remove the prefix ``module.`` of distributed training, if all names have it."""
    result = OrderedDict(weights)
    if all(key.startswith('module.') for key in result):
        result = _renamed(result, methodcaller('removeprefix', 'module.'))
    return with_metadata(result, weights)


def with_metadata(
    weights: 'OrderedDict[str, Tensor]', origin: Mapping[str, Tensor]
) -> 'OrderedDict[str, Tensor]':
    """Give a state dict the versions of modules that another one has, if any."""
    if hasattr(origin, METADATA):
        setattr(weights, METADATA, getattr(origin, METADATA))
    return weights


def to_own_layout(checkpoint: Any, source: str) -> Any:
    """Turn a checkpoint into one with ``state_dict`` and our names.

    Args:
        checkpoint (Any): Content of a file.
        source (str): Name of the file, for errors.

    Returns:
        A dict with ``state_dict``, with ``state_dict_ema`` if there are averaged
        weights, and with all other content. A checkpoint of another network is returned
        unchanged.

    Raises:
        CheckpointError: If ``state_dict_ema`` or ``ema_state_dict`` contains anything
            but weights.
    """
    try:
        weights = find_weights(checkpoint, source)
    except CheckpointError:
        return checkpoint
    _require_sound_swapped(checkpoint, source)
    if describe(weights) is None:
        return checkpoint
    if checkpoint is weights:
        return dict(state_dict=to_own_names(weights))
    result = {key: value for key, value in checkpoint.items() if key != 'model'}
    result['state_dict'] = to_own_names(weights)
    averaged = result.pop(EMA_KEY, None)
    if isinstance(averaged, Mapping):
        result[EMA_KEY] = to_own_names(find_weights(checkpoint, source, ema=True))
    return result


def _require_sound_swapped(checkpoint: Mapping, source: str) -> None:
    """Refuse what MMEngine's EMAHook cannot have saved, if it has saved anything."""
    if SWAPPED_KEY not in checkpoint:
        return
    content = checkpoint[SWAPPED_KEY]
    # Other programs' averages may have more beside these names.
    if not has_names(content) or not all(
        isinstance(value, Tensor) and (key != 'steps' or value.dim() == 0)
        for key, value in content.items()
        if key == 'steps' or key.startswith('module.')
    ):
        raise CheckpointError(
            f"{source} cannot be loaded: its '{SWAPPED_KEY}' is not as MMEngine's "
            'EMAHook saves it. Fetch the file again.'
        )


def _plain_of_swapped(checkpoint: Mapping) -> Mapping[str, Tensor]:
    """The plain weights in a checkpoint of MMEngine's EMAHook."""
    plain = OrderedDict(
        (key.removeprefix('module.'), value)
        for key, value in checkpoint[SWAPPED_KEY].items()
        # Beside them there is the number of updates of the average.
        if isinstance(key, str) and key.startswith('module.')
    )
    return with_metadata(plain, checkpoint.get('state_dict', plain))


def _renamed(
    weights: Mapping[str, Tensor], rename: Callable[[str], str]
) -> 'OrderedDict[str, Tensor]':
    return OrderedDict((rename(key), value) for key, value in weights.items())


def _to_own_classifier(key: str) -> str:
    for theirs, ours in _CLASSIFIER_NAMES.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return f'backbone.{key}'
