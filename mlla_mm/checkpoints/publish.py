# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A checkpoint for others: the weights alone, under a name that tells them apart."""

import hashlib
import io
from pathlib import Path
from typing import Optional, Union

import torch

from ..utils.files import write_whole
from .layout import describe, find_weights, to_own_names
from .reader import CheckpointError, load_checkpoint_file

#: What is kept of a checkpoint's ``meta``: the names and colours of the classes, as
#: MMEngine saves them and as older toolboxes did, and which training it was.
PUBLISHED_META = (
    *('dataset_meta', 'CLASSES', 'PALETTE'),
    *('epoch', 'iter', 'mmengine_version'),
)


def publish(
    source: Union[str, Path],
    destination: Union[str, Path],
    ema: bool = False,
    trust: Optional[bool] = None,
) -> Path:
    """Write the weights of any MLLA checkpoint in this package's layout.

    The file holds ``state_dict`` and, of OpenMMLab's checkpoints, what
    :data:`PUBLISHED_META` names of ``meta`` (for inference: the names of the classes).
    The config, a program that MMEngine would execute, is left out: publish it beside
    the file. The authors' classifiers become ours. As in OpenMMLab, the first 8 digits
    of the file's SHA-256 go at the end of its name.

    Args:
        source (str | Path): A checkpoint of the authors or of this package.
        destination (str | Path): Path of the new file, which ends in .pth.
        ema (bool): Take the averaged weights, not the plain ones. Defaults to False.
        trust (bool, optional): See
            :func:`mlla_mm.checkpoints.reader.load_checkpoint_file`.

    Returns:
        Path: The file, DESTINATION-SHA256.pth.

    Raises:
        FileNotFoundError: If there is no ``source``.
        ValueError: If ``destination`` ends otherwise.
        CheckpointError: If ``source`` is no checkpoint of an MLLA.
    """
    destination = Path(destination)
    if destination.suffix != '.pth':
        raise ValueError(f'The new file must end in .pth, got {destination}.')
    checkpoint = load_checkpoint_file(source, trust=trust)
    weights = to_own_names(find_weights(checkpoint, str(source), ema))
    if describe(weights) is None:
        raise CheckpointError(f'{source} holds no MLLA.')
    published = dict(state_dict=weights)
    meta = checkpoint.get('meta')
    if isinstance(meta, dict):
        published['meta'] = {key: meta[key] for key in PUBLISHED_META if key in meta}
    buffer = io.BytesIO()
    torch.save(published, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    path = destination.with_name(f'{destination.stem}-{digest[:8]}.pth')
    write_whole(path, buffer.getbuffer())
    return path
