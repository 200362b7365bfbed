# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Makes a checkpoint for others: only weights, with a checksum in the file name."""

import hashlib
import io
from pathlib import Path
from typing import Optional, Union

import torch

from ..utils.files import write_whole
from .layout import describe, find_weights, to_own_names
from .reader import CheckpointError, load_checkpoint_file

#: Keys of ``meta`` that are kept: names and colours of the classes (as MMEngine and as
#: older toolboxes save them), and how far the training was.
PUBLISHED_META = (
    *('dataset_meta', 'CLASSES', 'PALETTE'),
    *('epoch', 'iter', 'mmengine_version'),
)


def publish(
    source: Union[str, Path],
    destination: Union[str, Path],
    ema: Optional[bool] = None,
    trust: Optional[bool] = None,
) -> Path:
    """Write the weights of a checkpoint in this package's layout.

    The new file contains ``state_dict`` and the keys :data:`PUBLISHED_META` of
    ``meta``, among them the class names for inference. It does not contain the config,
    because MMEngine would execute it; publish the config as a file of its own. As in
    OpenMMLab, the file name ends in the first 8 digits of the file's SHA-256.

    Args:
        source (str | Path): A checkpoint of the authors or of this package.
        destination (str | Path): Path of the new file. It ends in .pth.
        ema (bool, optional): As in :func:`mlla_mm.checkpoints.layout.find_weights`.
            Defaults to None.
        trust (bool, optional): Whether the source may run code, see
            :func:`mlla_mm.checkpoints.reader.load_checkpoint_file`. Defaults to None.

    Returns:
        Path: The new file, DESTINATION-SHA256.pth.

    Raises:
        FileNotFoundError: If there is no ``source``.
        ValueError: If ``destination`` does not end in .pth.
        CheckpointError: If ``source`` is no checkpoint of an MLLA or of a
            LinearAttentionSwin.
    """
    destination = Path(destination)
    if destination.suffix != '.pth':
        raise ValueError(f'The new file must end in .pth, got {destination}.')
    checkpoint = load_checkpoint_file(source, trust=trust)
    weights = to_own_names(find_weights(checkpoint, str(source), ema))
    if describe(weights) is None:
        raise CheckpointError(f'{source} holds no MLLA and no LinearAttentionSwin.')
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
