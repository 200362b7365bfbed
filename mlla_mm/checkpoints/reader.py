# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Reading checkpoint files without running the code that a pickle may carry.

One reader serves every version of PyTorch: Python's ``zipfile`` for the file,
:mod:`mlla_mm.checkpoints.unpickler` for the pickle in it, and tensors that are
checked to lie within the memory that was read for them. ``torch.load`` is for files
that are trusted. SECURITY.md says why.
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
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_dist_info
from torch import Tensor

from ..utils.files import NotRegularFileError, check_regular_file
from ..utils.text import PATH_LIMIT, describe_error, printable
from .unpickler import (
    Refused,
    Storage,
    StorageType,
    Unpickler,
    require_booleans,
    storage_from_bytes,
)

_trusted = False


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the way out."""


def trust_checkpoints(trust: bool) -> None:
    """Say whether checkpoints may run code from now on, as PyTorch lets them.

    Args:
        trust (bool): True executes whatever checkpoints contain. Off at first.
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

    It may hold tensors, NumPy arrays and scalars, plain containers and MMEngine's
    ``HistoryBuffer``. Configs of yacs, mmcv and argparse become plain dicts, without
    these packages; so do defaultdicts, and deques become lists.

    Args:
        path (str | Path): Local path.
        map_location (str | torch.device | Callable, optional): Where tensors go,
            wherever they were saved. A function gets each storage on the CPU and
            'cpu', as that of ``torch.load`` does, and returns it elsewhere. None is
            the CPU. Defaults to 'cpu'.
        trust (bool, optional): True allows anything else too, in every format of
            PyTorch's, and so runs the code that the file may carry. None means what
            :func:`trust_checkpoints` was told.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, no checkpoint, or too large for the
            memory, or if it holds anything else and is not trusted.
    """
    path = _regular_file(path)
    map_location = map_location or 'cpu'
    if not callable(map_location):
        torch.empty(0, device=map_location)  # or the file would be blamed
    if _trusted if trust is None else trust:
        return _load_trusted(path, map_location)
    return _read(path, map_location)


def read_checkpoint_meta(path: Union[str, Path]) -> Dict[str, Any]:
    """What a checkpoint says of itself in ``meta``, without reading its tensors.

    Args:
        path (str | Path): Local path.

    Returns:
        dict: Epoch, iter, seed and so on; empty if there is none.

    Raises:
        As :func:`load_checkpoint_file`, but damaged tensors are not noticed.
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
    """Read a plain pickle of data, such as predictions that MMEngine dumped.

    Args:
        path (str | Path): Local path.

    Returns:
        What was saved, of the kinds that :func:`load_checkpoint_file` reads.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, or if it holds anything else.
    """
    path = _regular_file(path)
    # How tensors are pickled outside of checkpoints.
    names = {('torch.storage', '_load_from_bytes'): storage_from_bytes}
    with _errors_of(path, 'Make it again, with a program that you trust.'):
        return Unpickler(path.read_bytes(), names=names).load()


def fetch_checkpoint(url: str) -> Path:
    """Download a file into PyTorch's cache, once, the first process before the others.

    The cache tells addresses apart that end in the same name. Where the name ends in
    digits of the file's SHA-256, as those of PyTorch and OpenMMLab do, they are
    compared.

    Args:
        url (str): An http or https address.

    Returns:
        Path: The local file.

    Raises:
        CheckpointError: If the download fails, or if it is not the file that its name
            says.
    """
    try:
        name = Path(urlparse(url).path).name
    except ValueError:  # no address: downloading it says so
        name = ''
    name = re.sub(r'[^\w.-]', '_', name)[-100:]
    name = name if name.strip('.') else 'checkpoint'
    address = hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / 'checkpoints' / address / name
    if get_dist_info()[0] > 0:
        barrier()
    try:
        if not path.is_file():
            _download(url, path)
    finally:  # the others are not to wait for one that failed
        if get_dist_info()[0] == 0:
            barrier()
    return path


def _download(url: str, path: Path) -> None:
    digest = _DIGEST.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1])
    # ValueError, HTTPException: of an answer that is none; RuntimeError: of another
    # digest.
    except (OSError, ValueError, HTTPException, RuntimeError) as error:
        raise CheckpointError(
            f'{printable(url)} cannot be fetched ({printable(str(error))}). Download '
            'it by other means and give its path.'
        ) from error


# Not the 8 digits of a date in this century.
_DIGEST = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')
_OLD_BEGINNING = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_CHUNK = 1 << 24


def _regular_file(path: Union[str, Path]) -> Path:
    """The path of a file that can be read to its end, which a pipe may not have."""
    shown = printable(path, PATH_LIMIT)
    try:
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f'Checkpoint not found: {shown}')
        check_regular_file(path)
        with path.open('rb') as file:
            beginning = file.read(256)
    except FileNotFoundError:
        raise
    except NotRegularFileError as error:
        raise CheckpointError(
            f'{shown} {error.problem}: give the path of a checkpoint file.'
        ) from None
    # RuntimeError: of a user without a home.
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f'{shown} cannot be read ({printable(str(error))}).'
        ) from error
    if not beginning:
        raise CheckpointError(
            f'{shown} is empty: a download failed. Delete it and fetch it again.'
        )
    if beginning.lstrip().startswith(b'<'):
        raise CheckpointError(
            f'{shown} is a web page, not a checkpoint: the download went wrong. Delete '
            'it, open its address in a browser, and fetch the file again.'
        )
    return path


@contextmanager
def _errors_of(path: Path, way_out: str) -> Iterator[None]:
    """Say of which file an error is, and what to do.

    Args:
        path (Path): The file.
        way_out (str): What to do if the file asks for more than data.
    """
    shown = printable(path, PATH_LIMIT)
    try:
        yield
    except Refused as refused:
        raise CheckpointError(
            f'{shown} is not loaded: it asks for {refused}. More than tensors, arrays '
            f'and plain containers can run any code, or use up the memory. {way_out}'
        ) from None
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        # Or what was read so far would stay, and there be no memory for a message.
        traceback.clear_frames(error.__traceback__)
        raise CheckpointError(f'{shown} needs more memory than there is.') from None
    except Exception as error:  # reading damaged data may raise anything
        raise CheckpointError(
            f'{shown} is damaged, or not a checkpoint. Delete it and fetch it again. '
            f'({describe_error(error)})'
        ) from error


_TRUST = (
    'If you trust where it comes from, add --trust-checkpoint or, in the config, '
    'trust_checkpoint = True.'
)


def _load_trusted(path: Path, map_location: Any) -> Any:
    value = os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '')
    if value.lower() in ('1', 'y', 'yes', 'true'):
        raise CheckpointError(
            f'{printable(path, PATH_LIMIT)} is not loaded as a trusted file: '
            f'TORCH_FORCE_WEIGHTS_ONLY_LOAD={value} is set. Unset it, or leave '
            '--trust-checkpoint out.'
        )
    with _errors_of(path, _TRUST):
        return torch.load(path, map_location=map_location, weights_only=False)


def _read(path: Path, map_location: Any) -> Any:
    """Read a checkpoint, without its tensors if ``map_location`` is None."""
    storages: Dict[str, Tuple[StorageType, Tensor]] = {}

    def load_storage(kind: StorageType, key: str, length: int) -> Storage:
        if map_location is None:
            return Storage(None, kind.dtype)
        if key not in storages:
            memory = archive.read_tensor(f'data/{key}')
            require_booleans(memory, kind.dtype)
            storages[key] = kind, _placed(memory, map_location)
        same_kind, memory = storages[key]
        if (kind, length * kind.dtype.itemsize) != (same_kind, memory.numel()):
            raise ValueError(f'record {key} has {memory.numel()} bytes')
        return Storage(memory, kind.dtype)

    with path.open('rb') as file:
        _require_zip(path, file)
        with _errors_of(path, _TRUST):
            archive = _Archive(file)
            return Unpickler(archive.read('data.pkl'), load_storage).load()


def _placed(memory: Tensor, map_location: Any) -> Tensor:
    if not callable(map_location):
        return memory.to(map_location)
    storage = map_location(memory.untyped_storage(), 'cpu')
    if storage is None:
        return memory
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _require_zip(path: Path, file: BinaryIO) -> None:
    """Refuse PyTorch's older formats, in which nothing tells where tensors end."""
    beginning, shown = file.read(512), printable(path, PATH_LIMIT)
    if beginning.startswith(_OLD_BEGINNING) or beginning[257:262] == b'ustar':
        raise CheckpointError(
            f"{shown} is in PyTorch's format of before version 1.6, which is not read. "
            'Save it again with torch.load and torch.save of a newer PyTorch. '
            f'{_TRUST}'
        )
    if not beginning.startswith(b'PK'):
        raise CheckpointError(
            f'{shown} is damaged, or not a checkpoint. Delete it and fetch it again.'
        )


class _Archive:
    """The records of a zip file that ``torch.save`` wrote.

    Args:
        file (BinaryIO): The open file.

    Raises:
        Refused: If the file is a program, or packed such that it may grow.
        Exception: Of any kind, if it is damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file)
        records = {info.filename: info for info in self._zip.infolist()}
        self._folder = next(iter(records)).split('/')[0]
        if f'{self._folder}/constants.pkl' in records:
            raise Refused('a TorchScript program')
        # Compressed or overlapping, a few bytes become any number.
        if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
            raise Refused('compressed records')
        total = sum(info.file_size for info in self._zip.infolist())
        if total > os.fstat(file.fileno()).st_size:
            raise Refused('records that overlap')
        for info in records.values():
            if not info.CRC:  # PyTorch can be told to save without checksums
                del info.CRC
        if (
            f'{self._folder}/byteorder' in records
            and self.read('byteorder') != b'little'
        ):
            raise Refused('big-endian numbers')

    def read(self, name: str) -> bytes:
        """A record."""
        return self._zip.read(f'{self._folder}/{name}')

    def read_tensor(self, name: str) -> Tensor:
        """A record as a tensor, uint8 of shape (N,)."""
        info = self._zip.getinfo(f'{self._folder}/{name}')
        memory = torch.empty(info.file_size, dtype=torch.uint8)
        rest = memoryview(memory.numpy())
        with self._zip.open(info) as record:
            while len(rest):
                count = record.readinto(rest[:_CHUNK])
                if not count:
                    raise EOFError(f'record {printable(name)} ends too early')
                rest = rest[count:]
        return memory
