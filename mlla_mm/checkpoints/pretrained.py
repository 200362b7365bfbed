# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Published weights: their addresses, and how a backbone starts from them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Dict, List, Optional, Union

from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ..compat.openmmlab import note_init_info
from ..utils.text import printable
from .fit import check_fit
from .layout import EMA_KEY, describe, find_weights, to_own_names
from .reader import CheckpointError, fetch_checkpoint, load_checkpoint_file

PUBLISHED_WEIGHTS: Dict[str, str] = {
    'MLLA_T.pth': 'https://cloud.tsinghua.edu.cn/f/7a19712877cb4242889c/?dl=1',
    'MLLA_S.pth': 'https://cloud.tsinghua.edu.cn/f/0e5d0b1409d540aaa80c/?dl=1',
    'MLLA_B.pth': 'https://cloud.tsinghua.edu.cn/f/91c85c5a1061496d8796/?dl=1',
}
"""Addresses of the authors' ImageNet-1K classifiers, by file name."""

_OUTPUT_NORM = re.compile(r'^norm\d\.')


def require_weights(path: Union[str, Path]) -> None:
    """Require a weight file to exist.

    Args:
        path (str | Path): Local path of a checkpoint.

    Raises:
        FileNotFoundError: If there is no such file. The message says where to get it.
    """
    path = Path(path)
    if path.is_file():
        return
    address = PUBLISHED_WEIGHTS.get(path.name)
    if address is None:
        way_out = "Check the path, or set the backbone's init_cfg to None."
    else:
        way_out = (
            f"Download the authors' file:\n    mkdir -p {path.parent} && "
            f"wget -O {path} '{address}'\nor train from scratch with "
            '--cfg-options model.backbone.init_cfg=None'
        )
    raise FileNotFoundError(f'Pretrained weights not found: {path}\n{way_out}')


def load_pretrained(
    backbone: nn.Module,
    checkpoint: Union[str, Path],
    ema: Optional[bool] = None,
    prefix: Optional[str] = None,
) -> None:
    """Load the weights of a backbone from any checkpoint that contains one.

    The checkpoint may be of a backbone, classifier, detector or segmentor, saved by the
    authors or by this package. Two kinds of weights are left out: output norms that the
    backbone does not have, and a classifier's ``head`` and last ``norm``. Output norms
    that get no weights keep their own values (they start fresh), as in the authors'
    recipe.

    Args:
        backbone (nn.Module): The backbone. Its parameters have the official names.
        checkpoint (str | Path): Local path, or http(s) address.
        ema (bool, optional): True takes the averaged weights, False the plain ones. It
            has to be given for a checkpoint of our ImageNet training, which has both.
            None takes the average of MMEngine's EMAHook, as MMEngine does, and the
            plain ones of other files. Defaults to None.
        prefix (str, optional): Text before the backbone's names in the file, as in
            MMEngine's ``Pretrained``. None finds it out. Defaults to None.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is no checkpoint, if ``ema`` has to be given, or if
            the weights do not fit.
    """
    source = str(checkpoint)
    if source.startswith(('http://', 'https://')):
        checkpoint = fetch_checkpoint(source)
    require_weights(checkpoint)
    content = load_checkpoint_file(checkpoint)
    # In the authors' files, the plain ones are the published ones.
    has_both = (
        isinstance(content, Mapping) and {'state_dict', EMA_KEY} <= content.keys()
    )
    if ema is None and has_both:
        raise CheckpointError(
            f'{source} holds plain and averaged weights. Choose with ema=False or '
            f"ema=True, as in dict(type='Pretrained', checkpoint='{source}', ema=True)."
        )
    saved = find_weights(content, source, ema)
    weights = to_own_names(saved)
    network = describe(weights)
    own = backbone.state_dict()
    if prefix is None:
        prefix = network.prefix if network else ''
    elif prefix:
        prefix = prefix.rstrip('.') + '.'
    is_classifier = network is not None and network.task == 'classifier'
    entering: Dict[str, Tensor] = {}
    left_out: List[str] = []
    for key, value in weights.items():
        name = key[len(prefix) :] if key.startswith(prefix) else None
        if name is None:
            left_out.append(key)
        elif _OUTPUT_NORM.match(name) and (is_classifier or name not in own):
            left_out.append(name)
        else:
            entering[name] = value
    check_fit(own, entering, source, fresh=_OUTPUT_NORM)
    fresh = backbone.load_state_dict(entering, strict=False).missing_keys
    if len(weights) < len(saved):
        left_out.append('rope.rotations')
    print_log(
        f'Loaded {len(entering)} tensors of {network} from {source}; '
        f'left out: {_parts(left_out)}; fresh: {_parts(fresh)}.',
        logger='current',
    )


# Replaces MMEngine's class of this name, also for the registries derived from this one.
@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class Pretrained(PretrainedInit):
    """``init_cfg=dict(type='Pretrained', checkpoint=PATH)``, also for our backbones.

    An MLLA or LinearAttentionSwin gets its weights from :func:`load_pretrained`, which
    knows the layouts of checkpoints. Every other module gets them from MMEngine.
    Configs have to use this name, not the class: MMEngine applies the initialiser of
    this name last.

    Args:
        checkpoint (str): Local path or address.
        prefix (str, optional): Text before the module's names in the file. For our
            backbones, None finds it out; for other modules, None means no prefix.
            Defaults to None.
        map_location (str): Device to which MMEngine loads the tensors of other modules.
            Defaults to 'cpu'.
        ema (bool, optional): Whether a backbone of ours takes the averaged weights,
            see :func:`load_pretrained`. Defaults to None.

    Raises:
        ValueError: If ``ema`` is given for another module.
    """

    def __init__(
        self,
        checkpoint: Union[str, Path],
        prefix: Optional[str] = None,
        map_location: str = 'cpu',
        ema: Optional[bool] = None,
    ) -> None:
        super().__init__(checkpoint, prefix, map_location)
        self.ema = ema

    def __call__(self, module: nn.Module) -> None:
        network = describe(module.state_dict())
        if network is not None and not network.prefix:
            load_pretrained(module, self.checkpoint, self.ema, self.prefix)
            note_init_info(module, self._get_init_info())
        elif self.ema is not None:
            raise ValueError(
                f'ema={self.ema} is for an MLLA or a LinearAttentionSwin, and '
                f'{type(module).__name__} is none. Remove ema from init_cfg.'
            )
        else:
            super().__call__(module)


def _parts(keys: Iterable[str]) -> str:
    """List the parts of a model that keys belong to, for a message."""
    parts = {key if key == 'rope.rotations' else key.split('.')[0] for key in keys}
    return printable(', '.join(sorted(parts))) or 'nothing'
