# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Makes MMEngine load checkpoints without running the code in them.

MMEngine's own loading schemes execute pickles. Importing this module replaces them for
everything that uses ``CheckpointLoader``: ``load_from``, resuming, the ``Pretrained``
initialisation of any module, and inferencers.
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
    """Read a local file. A checkpoint of the authors' MLLA gets our layout and names.

    If ``map_location`` is None, the tensors go to the CPU.
    """
    checkpoint = load_checkpoint_file(filename, map_location)
    if not checkpoints_are_trusted():
        _remove_programs(checkpoint)
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    if not has_names(content.get('state_dict', content)):
        # MMEngine would fail far from here.
        raise CheckpointError(
            f'{filename} holds no weights: expected names and tensors, at the top '
            "level or under 'state_dict'."
        )
    return to_own_layout(checkpoint, str(filename))


@CheckpointLoader.register_scheme(prefixes=['http://', 'https://'], force=True)
def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Read a file from the web, through PyTorch's cache."""
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
    own = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    return dict(state_dict=own)


@CheckpointLoader.register_scheme(prefixes='pavi://', force=True)
def load_from_pavi(filename: str, map_location: Any = None) -> Any:
    """Refuse pavi://, because MMEngine's own scheme for it executes pickles.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f'mlla_mm does not load from pavi://. Download {filename} and give its path.'
    )


def _name(address: str) -> str:
    return address.split('://', 1)[1]


def _remove_programs(checkpoint: Any) -> None:
    """Remove the configs, which a checkpoint contains as text.

    MMEngine executes such a text as Python when it resumes, and in an inferencer that
    has no other config.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    hub = content.get('message_hub')
    runtime = hub.get('runtime_info') if isinstance(hub, dict) else None
    for holder, keys in ((content.get('meta'), ('config', 'cfg')), (runtime, ('cfg',))):
        if isinstance(holder, dict):
            for key in keys:
                holder.pop(key, None)
