# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A checkpoint for others: the weights alone, under a name that tells them apart."""

import hashlib
import io
from pathlib import Path
from typing import Optional, Union

import torch

from ..models.checkpoint_layout import describe, find_weights, to_own_names
from ..utils.checkpoint_file import CheckpointError, load_checkpoint_file
from ..utils.files import write_whole


def publish(
    source: Union[str, Path],
    destination: Union[str, Path],
    ema: bool = False,
    trust: Optional[bool] = None,
) -> Path:
    """Write the weights of any MLLA checkpoint in this package's layout.

    The file holds ``state_dict`` and, of OpenMMLab's checkpoints, ``meta`` (for
    inference: the names of the classes). The authors' classifiers become ours. As in
    OpenMMLab, the first 8 digits of the file's SHA-256 go at the end of its name.

    Args:
        source (str | Path): A checkpoint of the authors or of this package.
        destination (str | Path): Path of the new file, which ends in .pth.
        ema (bool): Take the averaged weights, not the plain ones. Defaults to False.
        trust (bool, optional): See
            :func:`mlla_mm.utils.checkpoint_file.load_checkpoint_file`.

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
    if isinstance(checkpoint.get('meta'), dict):
        published['meta'] = checkpoint['meta']
    buffer = io.BytesIO()
    torch.save(published, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    path = destination.with_name(f'{destination.stem}-{digest[:8]}.pth')
    write_whole(path, buffer.getbuffer())
    return path
