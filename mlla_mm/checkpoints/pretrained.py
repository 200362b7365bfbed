# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Published weights: where they are, and how they enter a backbone."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ..compat.openmmlab import note_init_info
from ..utils.text import printable
from .layout import Network, check_fit, describe, find_weights, to_own_names
from .reader import fetch_checkpoint, load_checkpoint_file

PUBLISHED_WEIGHTS: Dict[str, str] = {
    'MLLA_T.pth': 'https://cloud.tsinghua.edu.cn/f/7a19712877cb4242889c/?dl=1',
    'MLLA_S.pth': 'https://cloud.tsinghua.edu.cn/f/0e5d0b1409d540aaa80c/?dl=1',
    'MLLA_B.pth': 'https://cloud.tsinghua.edu.cn/f/91c85c5a1061496d8796/?dl=1',
}
"""File name and address of the authors' ImageNet-1K classifiers."""

_OUTPUT_NORM = re.compile(r'^norm\d\.')


def require_weights(path: Union[str, Path]) -> None:
    """Raise an error that tells where to get a weight file which is not there.

    Args:
        path (str | Path): Local path of a checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
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
    """Start a backbone from any checkpoint that holds one.

    Reads the authors' and our classifiers, detectors and segmentors, and checkpoints of
    a backbone. Of a classifier the ``head`` and the ``norm`` before it are left out:
    the output norms start fresh, as in the authors' recipe. So do output norms that the
    file does not have; those that the backbone does not have are left out.

    Args:
        backbone (nn.Module): The backbone, its parameters under the official names.
        checkpoint (str | Path): Local path, or http(s) address.
        ema (bool, optional): Whether to take the averaged weights, not the plain ones.
            A checkpoint of our own ImageNet training has both, and needs the choice.
            From the authors' files None takes the plain ones. Defaults to None.
        prefix (str, optional): What precedes the backbone's names in the file, as in
            MMEngine's ``Pretrained``. None finds out. Defaults to None.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is no checkpoint or a choice is missing, or if its
            weights do not fit.
    """
    source = str(checkpoint)
    if source.startswith(('http://', 'https://')):
        checkpoint = fetch_checkpoint(source)
    require_weights(checkpoint)
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    saved = find_weights(load_checkpoint_file(checkpoint), source, ema)
    weights = to_own_names(saved)
    network = describe(weights)
    if prefix is None:
        prefix = network.prefix if network else ''
    entering, left_out = _split(weights, prefix, network, backbone.state_dict())
    check_fit(backbone.state_dict(), entering, source, fresh=_OUTPUT_NORM)
    fresh = backbone.load_state_dict(entering, strict=False).missing_keys
    if len(weights) < len(saved):
        left_out.append('rope.rotations')
    print_log(
        f'Loaded {len(entering)} tensors of {network} from {source}; '
        f'left out: {_parts(left_out)}; fresh: {_parts(fresh)}.',
        logger='current',
    )


# MMEngine knows the name alone, which a derived registry looks up in the root one.
@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class Pretrained(PretrainedInit):
    """``init_cfg=dict(type='Pretrained', checkpoint=PATH)``, also for an MLLA.

    An MLLA starts by :func:`load_pretrained`, which knows the layouts of its
    checkpoints, and every other module as MMEngine starts it. The type is this name,
    not a class: MMEngine lets what is called so come last.

    Args:
        checkpoint (str): Local path or address.
        prefix (str, optional): What precedes the module's names in the file. None
            finds out for an MLLA, and means nothing for others. Defaults to None.
        map_location (str): Where MMEngine puts the tensors of other modules.
            Defaults to 'cpu'.
        ema (bool, optional): Which weights an MLLA takes, see :func:`load_pretrained`.
            Defaults to None.

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
                f'ema={self.ema} is for the weights of an MLLA, and '
                f'{type(module).__name__} is none: leave it out.'
            )
        else:
            super().__call__(module)


def _split(
    weights: Mapping[str, Tensor],
    prefix: str,
    network: Optional[Network],
    own: Mapping[str, Tensor],
) -> Tuple[Dict[str, Tensor], List[str]]:
    """What enters a backbone, under its names, and the names of what does not."""
    is_classifier = network is not None and network.task == 'classifier'
    entering, left_out = {}, []
    for key, value in weights.items():
        name = key[len(prefix) :] if key.startswith(prefix) else None
        if name is None:
            left_out.append(key)
        elif _OUTPUT_NORM.match(name) and (is_classifier or name not in own):
            left_out.append(name)
        else:
            entering[name] = value
    return entering, left_out


def _parts(keys: Iterable[str]) -> str:
    """The parts of a model that keys belong to, for a message."""
    parts = {key if key == 'rope.rotations' else key.split('.')[0] for key in keys}
    return printable(', '.join(sorted(parts))) or 'nothing'
