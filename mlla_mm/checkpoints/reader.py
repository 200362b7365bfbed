# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Reads checkpoint files without running the code that a pickle may contain.

One reader serves every version of PyTorch. Python's ``zipfile`` opens the file,
:mod:`mlla_mm.checkpoints.unpickler` reads the pickle in it, and every tensor is checked
to lie within the memory that was read for it. ``torch.load`` reads trusted files only.
SECURITY.md gives the reasons.
"""

import hashlib
import os
import re
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, Dict, Optional, Tuple, Union

import torch
from mmengine.dist import barrier, get_dist_info
from torch import Tensor

from ..utils.files import file_problem
from ..utils.text import PATH_LIMIT, describe_error, printable
from .unpickler import (
    OLD_FORMAT,
    Refused,
    Storage,
    StorageType,
    Unpickler,
    read_memory,
    storage_from_bytes,
)

_trusted = False


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file and the way out."""


def trust_checkpoints(trust: bool) -> None:
    """Set whether checkpoints may run code from now on.

    Args:
        trust (bool): True runs whatever code checkpoints contain, as ``torch.load``
            does with ``weights_only=False``. At first nothing is trusted.
    """
    global _trusted
    _trusted = trust


def checkpoints_are_trusted() -> bool:
    """Whether :func:`trust_checkpoints` allows checkpoints to run code."""
    return _trusted


def load_checkpoint_file(
    path: Union[str, Path],
    map_location: Any = 'cpu',
    trust: Optional[bool] = None,
) -> Any:
    """Read a zip file that ``torch.save`` wrote.

    The file may contain tensors, NumPy arrays and scalars, plain containers and
    MMEngine's ``HistoryBuffer``. Configs of yacs, mmcv and argparse become dicts and do
    not need these packages. A defaultdict becomes a dict, and a deque a list.

    Args:
        path (str | Path): Local path.
        map_location (str | torch.device | Callable, optional): Device of the tensors,
            wherever they were when they were saved. A function gets each storage on
            the CPU and the text 'cpu', and returns the storage on another device or
            None, as for ``torch.load``. None means the CPU. Defaults to 'cpu'.
        trust (bool, optional): True also reads anything else, in every format that
            PyTorch knows, and runs the code that the file may contain. None means what
            :func:`trust_checkpoints` was told. Defaults to None.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, no checkpoint or too large for the
            memory, or if it contains anything else and is not trusted.
    """
    path = _regular_file(path)
    map_location = map_location or 'cpu'
    if not callable(map_location):
        torch.empty(0, device=map_location)  # a wrong device is not the file's fault
    if _trusted if trust is None else trust:
        return _load_trusted(path, map_location)
    return _read(path, map_location)


def read_checkpoint_meta(path: Union[str, Path]) -> Dict[str, Any]:
    """Read ``meta`` of a checkpoint, without its tensors.

    Args:
        path (str | Path): Local path.

    Returns:
        dict: What the checkpoint says of itself, such as epoch, iter and seed. It is
        empty if there is no ``meta``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: As in :func:`load_checkpoint_file`, but damaged tensors are
            not noticed.
    """
    path = _regular_file(path)
    try:
        content = _read(path, None)
    except CheckpointError:
        if not _trusted:
            raise
        content = _load_trusted(path, 'cpu')
    meta = content.get('meta') if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def load_pickle_file(path: Union[str, Path]) -> Any:
    """Read a plain pickle file of data, such as predictions that MMEngine dumped.

    Args:
        path (str | Path): Local path.

    Returns:
        What was saved. :func:`load_checkpoint_file` says which types it may have.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, or contains anything else.
    """
    path = _regular_file(path)
    # Plain pickles hold tensors in this way.
    names = {('torch.storage', '_load_from_bytes'): storage_from_bytes}
    with _errors_of(path, 'Make the file again, with a program that you trust.'):
        return Unpickler(path.read_bytes(), names=names).load()


def fetch_checkpoint(url: str) -> Path:
    """Download a file into PyTorch's cache, unless it is there already.

    The first process downloads and the others wait. Each address has a folder of its
    own in the cache, so equal file names do not clash. If the name ends in digits of
    the file's SHA-256, as names of PyTorch and OpenMMLab do, they are compared.

    Args:
        url (str): An http or https address.

    Returns:
        Path: The local file.

    Raises:
        CheckpointError: If the download fails, or if the digits differ.
    """
    name = re.split('[?#]', url)[0].rsplit('/', 1)[-1]
    name = re.sub(r'[^\w.-]', '_', name)[-100:]
    if not name.strip('.'):
        name = 'checkpoint'
    address = hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / 'checkpoints' / address / name
    digest = _DIGEST.search(name)
    if get_dist_info()[0] > 0:
        barrier()
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest and digest[1])
    # A ValueError or HTTPException is about a wrong address or answer, a RuntimeError
    # about another digest.
    except (OSError, ValueError, HTTPException, RuntimeError) as error:
        raise CheckpointError(
            f'{printable(url)} cannot be fetched ({printable(str(error))}). Download '
            'it by other means and give its path.'
        ) from error
    finally:  # the other processes must not wait for a download that failed
        if get_dist_info()[0] == 0:
            barrier()
    return path


# An 8-digit date of this century is no digest.
_DIGEST = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')


def _regular_file(path: Union[str, Path]) -> Path:
    """Return the path if it is of a file that has an end, which a pipe may not have."""
    shown = printable(path, PATH_LIMIT)
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise FileNotFoundError(f'Checkpoint not found: {shown}')
    problem = file_problem(path)
    if problem:
        raise CheckpointError(
            f'{shown} {problem}. Give the path of a checkpoint, or fetch it again.'
        )
    return path


@contextmanager
def _errors_of(path: Path, way_out: str) -> Iterator[None]:
    """Turn any error of reading a file into a CheckpointError that names the file.

    Args:
        path (Path): The file.
        way_out (str): What the user can do if the file asks for more than data.
    """
    shown = printable(path, PATH_LIMIT)
    try:
        yield
    except Refused as refused:
        raise CheckpointError(
            f'{shown} is not loaded: it asks for {refused}. Only tensors, arrays and '
            f'plain containers are safe to load. {way_out}'
        ) from None
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        # Frees what was read so far, so that there is memory for the message.
        traceback.clear_frames(error.__traceback__)
        raise CheckpointError(f'{shown} needs more memory than there is.') from None
    except Exception as error:  # damaged data may raise anything
        raise CheckpointError(
            f'{shown} is damaged, or not a checkpoint. Delete it and fetch it again. '
            f'({describe_error(error)})'
        ) from error


_TRUST = (
    'If you trust its source, add --trust-checkpoint to the command or '
    'trust_checkpoint = True to the config.'
)


def _load_trusted(path: Path, map_location: Any) -> Any:
    value = os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '')
    if value.lower() in ('1', 'y', 'yes', 'true'):
        raise CheckpointError(
            f'{printable(path, PATH_LIMIT)} is not loaded as a trusted file: '
            f'TORCH_FORCE_WEIGHTS_ONLY_LOAD={value} is set. Unset it, or do not '
            'trust the file.'
        )
    with _errors_of(path, _TRUST):
        return torch.load(path, map_location=map_location, weights_only=False)


def _read(path: Path, map_location: Any) -> Any:
    """Read a checkpoint that is not trusted.

    Args:
        path (Path): The file.
        map_location (str | torch.device | Callable, optional): Device of the tensors.
            None leaves the tensors out.
    """
    storages: Dict[str, Tuple[StorageType, Tensor]] = {}

    def load_storage(kind: StorageType, key: str, length: int) -> Storage:
        if map_location is None:
            return Storage(None, kind.dtype)
        if key not in storages:
            info = archive.getinfo(f'{folder}/data/{key}')
            with archive.open(info) as record:  # checks its CRC
                memory = read_memory(record, info.file_size, kind.dtype)
            storages[key] = kind, _move(memory, map_location)
        first_kind, memory = storages[key]
        if (kind, length * kind.dtype.itemsize) != (first_kind, memory.numel()):
            raise ValueError(f'record {key} has {memory.numel()} bytes')
        return Storage(memory, kind.dtype)

    with path.open('rb') as file:
        _require_zip(path, file.read(512))
        with _errors_of(path, _TRUST):
            archive, folder = _open_archive(file)
            return Unpickler(archive.read(f'{folder}/data.pkl'), load_storage).load()


def _require_zip(path: Path, beginning: bytes) -> None:
    """Refuse web pages, damaged files and PyTorch's older formats.

    In the older formats nothing tells where the memory of a tensor ends.
    """
    shown = printable(path, PATH_LIMIT)
    if beginning.startswith(OLD_FORMAT) or beginning[257:262] == b'ustar':
        raise CheckpointError(
            f'{shown} is in the format of PyTorch before 1.6, which is not read. Save '
            f'it again with torch.load and torch.save of a newer PyTorch. {_TRUST}'
        )
    if beginning.lstrip().startswith(b'<'):
        raise CheckpointError(
            f'{shown} is a web page, not a checkpoint: the download went wrong. Delete '
            'it, open its address in a browser, and fetch the file again.'
        )
    if not beginning.startswith(b'PK'):
        raise CheckpointError(
            f'{shown} is damaged, or not a checkpoint. Delete it and fetch it again.'
        )


def _open_archive(file: BinaryIO) -> Tuple[zipfile.ZipFile, str]:
    """Open a zip file that ``torch.save`` wrote.

    Returns:
        tuple[ZipFile, str]: The archive, and the folder that all its records are in.

    Raises:
        Refused: If the file is a program, or if a small file could fill the memory.
        Exception: Of any kind, if the file is damaged.
    """
    archive = zipfile.ZipFile(file)
    records = {info.filename: info for info in archive.infolist()}
    folder = next(iter(records)).split('/')[0]
    if f'{folder}/constants.pkl' in records:
        raise Refused('a TorchScript program')
    if any(
        info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
        for info in records.values()
    ):
        raise Refused('compressed records')
    if sum(i.file_size for i in archive.infolist()) > os.fstat(file.fileno()).st_size:
        raise Refused('records that overlap')
    for info in records.values():
        if not info.CRC:  # PyTorch can save without checksums
            del info.CRC
    order = f'{folder}/byteorder'
    if order in records and archive.read(order) != b'little':
        raise Refused('big-endian numbers')
    return archive, folder


def _move(memory: Tensor, map_location: Any) -> Tensor:
    """Move bytes, uint8 of shape (N,), to the device that ``map_location`` says."""
    if not callable(map_location):
        return memory.to(map_location)
    storage = map_location(memory.untyped_storage(), 'cpu')
    if storage is None:
        return memory
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
