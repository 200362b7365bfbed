# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How MMEngine loads checkpoints here: without running code, whoever published them.

Importing this module replaces MMEngine's loading schemes, which execute pickles, in
all that goes through ``CheckpointLoader``: ``load_from``, resuming, ``Pretrained``
initialisation of any module, inferencers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from mmengine.fileio import get_local_path
from mmengine.runner import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from .layout import find_weights, has_names, to_own_layout
from .reader import (
    CheckpointError,
    checkpoints_are_trusted,
    fetch_checkpoint,
    load_checkpoint_file,
)


# MMEngine logs what follows 'load_from_' in the names of these functions.
@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: Union[str, Path], map_location: Any = None) -> Any:
    """Read a local file; an MLLA of the authors' gets our layout and names.

    Tensors go to the CPU if ``map_location`` is None, wherever they were saved.
    """
    checkpoint = load_checkpoint_file(filename, map_location or 'cpu')
    if not checkpoints_are_trusted():
        _remove_programs(checkpoint)
    _require_names(checkpoint, filename)
    return to_own_layout(checkpoint, str(filename))


@CheckpointLoader.register_scheme(prefixes=['http://', 'https://'], force=True)
def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Read a file from the web, or from PyTorch's cache if it was fetched before."""
    return load_from_local(fetch_checkpoint(filename), map_location)


@CheckpointLoader.register_scheme(
    prefixes=[r'(\S+\:)?s3://', r'(\S+\:)?petrel://'], force=True
)
def load_from_ceph(filename: str, map_location: Any = None) -> Any:
    """Read a file of a Ceph storage, through MMEngine's petrel backend."""
    with get_local_path(filename, backend_args=dict(backend='petrel')) as path:
        return load_from_local(path, map_location)


@CheckpointLoader.register_scheme(
    prefixes=['torchvision://', 'modelzoo://'], force=True
)
def load_from_torchvision(filename: str, map_location: Any = None) -> Any:
    """Read weights that torchvision publishes, by their name."""
    return load_from_http(get_torchvision_models()[_name(filename)], map_location)


@CheckpointLoader.register_scheme(
    prefixes=['open-mmlab://', 'openmmlab://'], force=True
)
def load_from_openmmlab(filename: str, map_location: Any = None) -> Any:
    """Read weights that OpenMMLab publishes, by their name."""
    name = _name(filename)
    name = get_deprecated_model_names().get(name, name)
    return load_from_http(get_external_models()[name], map_location)


@CheckpointLoader.register_scheme(prefixes='mmcls://', force=True)
def load_from_mmcls(filename: str, map_location: Any = None) -> Any:
    """Read the backbone of a classifier that OpenMMLab publishes, by its name."""
    checkpoint = load_from_http(get_mmcls_models()[_name(filename)], map_location)
    weights = find_weights(checkpoint, filename)
    prefix = 'backbone.'
    return dict(
        state_dict={
            key[len(prefix) :]: value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
    )


@CheckpointLoader.register_scheme(prefixes='pavi://', force=True)
def load_from_pavi(filename: str, map_location: Any = None) -> Any:
    """Refuse what MMEngine's own scheme would execute.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f'mlla_mm does not load from pavi://. Download {filename} and give its path.'
    )


def _name(address: str) -> str:
    return address.split('://', 1)[1]


def _require_names(checkpoint: Any, filename: Union[str, Path]) -> None:
    """Refuse weights without names, which end in errors deep inside of MMEngine."""
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    if not has_names(content.get('state_dict', content)):
        raise CheckpointError(
            f'{filename} holds no weights: expected names and tensors, at the top '
            "level or under 'state_dict'."
        )


def _remove_programs(checkpoint: Any) -> None:
    """Remove the configs that a checkpoint carries as text.

    MMEngine executes the text as Python: when resuming, and in an inferencer that is
    given no config.
    """
    if not isinstance(checkpoint, Mapping):
        return
    for path, keys in {
        ('meta',): ('config', 'cfg'),
        ('message_hub', 'runtime_info'): ('cfg',),
    }.items():
        holder = checkpoint
        for key in path:
            holder = holder.get(key) if isinstance(holder, Mapping) else None
        if isinstance(holder, dict):
            for key in keys:
                holder.pop(key, None)
