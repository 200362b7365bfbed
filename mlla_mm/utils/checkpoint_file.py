# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Reading checkpoint files without running the code that a pickle may carry.

A checkpoint is a pickle, and a pickle names functions to call. The reader of this
module looks names up in a table of what checkpoints are made of, and never imports one.
"""

import os
import pickle
import tarfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Optional, Tuple, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.logging import HistoryBuffer

from . import compat

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
    """Read a file that ``torch.save`` wrote, in its zip format or the older one.

    It may hold tensors, NumPy arrays and scalars, plain containers and MMEngine's
    ``HistoryBuffer``. Configs of yacs, mmcv and argparse become plain dicts, without
    these packages.

    Args:
        path (str | Path): Local path.
        map_location: As in ``torch.load``. Defaults to 'cpu'.
        trust (bool, optional): True allows anything else too and so runs the code that
            the file may carry. None means what :func:`trust_checkpoints` was told.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged or no checkpoint, if it holds anything
            else and is not trusted, or if PyTorch is told to read files its way alone.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'Checkpoint not found: {path}')
    _check_beginning(path)
    _check_environment(path)
    trust = _trusted if trust is None else trust
    try:
        if trust:
            return torch.load(path, map_location=map_location, weights_only=False)
        return _load_restricted(path, map_location)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except _Refused as refused:
        raise CheckpointError(
            f'{path} is not loaded: it asks for {refused}, and a checkpoint that asks '
            'for more than tensors, arrays and plain containers can run any code. If '
            'you trust where it comes from, add --trust-checkpoint or, in the config, '
            'trust_checkpoint = True.'
        ) from None
    except Exception as error:  # reading damaged data may raise anything
        raise CheckpointError(
            f'{path} is damaged, or not a checkpoint. Delete it and fetch it again. '
            f'({type(error).__name__}: {error})'
        ) from error


def read_checkpoint_meta(path: Union[str, Path]) -> Dict[str, Any]:
    """What a checkpoint says of itself in ``meta``, without reading its tensors.

    Args:
        path (str | Path): Local path.

    Returns:
        dict: Epoch, iter, seed and so on; empty if there is none.

    Raises:
        As :func:`load_checkpoint_file`, but damaged tensors are not noticed.
    """
    try:
        archive = torch._C.PyTorchFileReader(str(path))
        content = _SkeletonUnpickler(BytesIO(archive.get_record('data.pkl'))).load()
    except Exception:  # of another format, or damaged: it knows which
        content = load_checkpoint_file(path)
    meta = content.get('meta') if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def fetch_checkpoint(url: str) -> Path:
    """Download a file into PyTorch's cache, once, the first process before the others.

    Args:
        url (str): An http or https address.

    Returns:
        Path: The local file.

    Raises:
        CheckpointError: If the download fails.
    """
    # As torch.hub names it.
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if get_dist_info()[0] > 0:
        barrier()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise CheckpointError(
                f'{url} cannot be fetched ({error}). Download it by other means and '
                'give its path.'
            ) from error
    if get_dist_info()[0] == 0:
        barrier()
    return path


def _check_beginning(path: Path) -> None:
    with path.open('rb') as file:
        beginning = file.read(256)
    if not beginning:
        raise CheckpointError(
            f'{path} is empty: a download failed. Delete it and fetch it again.'
        )
    if beginning.lstrip().startswith(b'<'):
        raise CheckpointError(
            f'{path} is a web page, not a checkpoint: the download went wrong. Delete '
            'it, open its address in a browser, and fetch the file again.'
        )
    # An archive of zeros would be an empty one; it is what some broken downloads are.
    if any(beginning) and tarfile.is_tarfile(path):
        raise CheckpointError(
            f'{path} is a tar archive, not a checkpoint: extract it, or, if it is in '
            "PyTorch's first format, save it again with a newer PyTorch."
        )


def _check_environment(path: Path) -> None:
    """PyTorch's own restrictions leave no room for another reader."""
    value = os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '')
    if value.lower() in ('1', 'y', 'yes', 'true'):
        raise CheckpointError(
            f'{path} is not loaded: TORCH_FORCE_WEIGHTS_ONLY_LOAD={value} is set, and '
            "PyTorch's weights-only reader refuses checkpoints of MMEngine. Unset it: "
            'checkpoints are read without running their code all the same.'
        )


class _Refused(Exception):
    """Raised for what the table of permitted names does not have; says what it is."""


def _load_restricted(path: Path, map_location: Any) -> Any:
    with path.open('rb') as file:
        archive = None
        is_zip = file.read(4) == b'PK\x03\x04'
        file.seek(0)
        if is_zip:
            archive = torch._C.PyTorchFileReader(file)
            if 'constants.pkl' in archive.get_all_records():
                # torch.load would hand it to torch.jit.load, and it is a program.
                raise _Refused('a TorchScript program')
        file.seek(0)
        return torch.load(
            file,
            map_location=map_location,
            weights_only=False,
            pickle_module=_pickle_module(
                None if compat.CHECKS_RECORD_LENGTHS else archive
            ),
        )


def _pickle_module(archive: Optional[Any]) -> SimpleNamespace:
    """What torch.load uses of a pickle module, restricted to the permitted names.

    Args:
        archive (torch._C.PyTorchFileReader, optional): The zip file that it reads, if
            the lengths of its records are to be checked.
    """

    class Unpickler(_RestrictedUnpickler):
        pass

    Unpickler.archive = archive
    return SimpleNamespace(
        __name__='restricted_pickle',
        Unpickler=Unpickler,
        load=lambda file, **kwargs: Unpickler(file, **kwargs).load(),
    )


# The Python implementation: that in C does not let a subclass check what a pickle does
# to objects which exist (BUILD). It reads a checkpoint's few thousand steps in no time.
class _RestrictedUnpickler(pickle._Unpickler):
    archive: Optional[Any] = None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PERMITTED:
            raise _Refused(f'{module}.{name}')
        return _PERMITTED[module, name]

    def get_extension(self, code: int) -> None:
        raise _Refused(f'extension {code} of copyreg')

    def load_build(self) -> None:
        """Set the state of an object, of those kinds whose state is data alone."""
        state = self.stack.pop()
        target = self.stack[-1]
        for kind, restore in _RESTORE.items():
            if isinstance(target, kind):
                restore(target, state)
                return
        raise _Refused(f'setting the state of {target!r}')

    def load_binpersid(self) -> None:
        """Read a storage of the archive, if it is as long as the pickle says."""
        if self.archive is not None:
            self._check_length(self.stack[-1])
        super().load_binpersid()

    def _check_length(self, storage: Tuple) -> None:
        _, kind, key, _, length = storage
        expected = length * torch._utils._element_size(_dtype_of_storage(kind))
        actual = len(self.archive.get_record(f'data/{key}'))
        if expected != actual:
            raise EOFError(f'record {key} has {actual} bytes instead of {expected}')

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BINPERSID[0]: load_binpersid,
    }


class _SkeletonUnpickler(_RestrictedUnpickler):
    """Reads all but tensors, which become None."""

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name.endswith('Storage'):
            return None  # torch.load knows them by itself
        value = super().find_class(module, name)
        return _no_tensor if module == 'torch._utils' else value

    def load_binpersid(self) -> None:
        self.stack[-1] = None

    dispatch = {
        **_RestrictedUnpickler.dispatch,
        pickle.BINPERSID[0]: load_binpersid,
    }


def _no_tensor(*args) -> None:
    return None


def _dtype_of_storage(kind: Any) -> torch.dtype:
    return torch.uint8 if kind is torch.UntypedStorage else kind.dtype


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``, of which pickles use this for bytes."""
    if encoding != 'latin1':
        raise _Refused(f'the encoding {encoding!r}')
    return text.encode('latin1')


def _statistics_method(owner: Any, name: str) -> None:
    """``getattr``, which HistoryBuffers call for methods that the class has anyway."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise _Refused('builtins.getattr')


def _numpy_dtype(name: str, align: bool = False, copy: bool = True) -> np.dtype:
    """A dtype of its own, so that its state is not that of NumPy's."""
    dtype = np.dtype(str(name), copy=True)
    if dtype.hasobject or dtype.names or dtype.subdtype:
        raise _Refused('a NumPy array of objects or records')
    return dtype


def _numpy_array(*args) -> np.ndarray:
    """An array that its state will fill."""
    return np.empty(0)


def _numpy_scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype, count=1)[0]


def _set_dict(target: dict, state: dict) -> None:
    """An argparse.Namespace has its values here, a yacs config its internals."""
    target.update({k: v for k, v in state.items() if not k.startswith('__')})


def _set_ordered_dict(target: OrderedDict, state: dict) -> None:
    """PyTorch keeps the versions of modules beside their weights."""
    if '_metadata' in state:
        target._metadata = state['_metadata']


def _set_history(target: HistoryBuffer, state: dict) -> None:
    names = ('max_length', '_log_history', '_count_history')
    target.__setstate__({name: state[name] for name in names})


def _set_numpy_dtype(target: np.dtype, state: Tuple) -> None:
    # (version, byte order, base and shape, names, fields, size, alignment, flags):
    # NumPy believes sizes and flags that are wrong, and then reads where it should not.
    sizes = state[5:7]
    if len(state) != 8 or state[2:5] != (None, None, None):
        raise _Refused('a NumPy array of objects or records')
    if sizes not in ((-1, -1), (target.itemsize, target.alignment)):
        raise ValueError(f'{target} of {sizes[0]} bytes')
    if state[7] != target.flags:
        raise ValueError(f'{target} with flags {state[7]}')
    target.__setstate__(state)


def _set_numpy_array(target: np.ndarray, state: Tuple) -> None:
    _, shape, dtype, _, data = state
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise _Refused('a NumPy array of objects')
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f'an array of shape {shape}')
    target.__setstate__(state)


# OrderedDict before dict, of which it is one.
_RESTORE: Dict[type, Callable] = {
    OrderedDict: _set_ordered_dict,
    dict: _set_dict,
    HistoryBuffer: _set_history,
    np.dtype: _set_numpy_dtype,
    np.ndarray: _set_numpy_array,
}

_HISTORY = 'mmengine.logging.history_buffer'
_BUILTINS = {
    **{
        kind.__name__: kind
        for kind in (
            *(bool, bytearray, bytes, complex, dict, float, frozenset, int, list),
            *(set, slice, str, tuple),
        )
    },
    'getattr': _statistics_method,
}
_NUMPY = {'_reconstruct': _numpy_array, 'scalar': _numpy_scalar}
# The names that a pickle may ask for, and what it gets. Whatever it calls with whatever
# arguments, what is here makes data of data. Nothing may be added that looks names up,
# calls its arguments, reads or writes files, or unpickles (torch.storage.
# _load_from_bytes does).
_PERMITTED: Dict[Tuple[str, str], Any] = {
    # Python 2's name for it is also that of pickles in protocol 2, torch.save's.
    **{('builtins', name): value for name, value in _BUILTINS.items()},
    **{('__builtin__', name): value for name, value in _BUILTINS.items()},
    ('collections', 'Counter'): Counter,
    ('collections', 'OrderedDict'): OrderedDict,
    ('collections', 'defaultdict'): defaultdict,
    ('collections', 'deque'): deque,
    ('_codecs', 'encode'): _encode,
    ('torch', 'Size'): torch.Size,
    ('torch', 'device'): torch.device,
    ('torch.storage', 'UntypedStorage'): torch.UntypedStorage,
    **{
        ('torch', str(value).split('.')[-1]): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    },
    **{
        ('torch._utils', name): getattr(torch._utils, name)
        for name in (
            *('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3'),
            '_rebuild_parameter',
        )
        if hasattr(torch._utils, name)  # v3, for dtypes that PyTorch 2.1 does not have
    },
    # The class of arrays, an argument of _reconstruct alone.
    ('numpy', 'ndarray'): None,
    ('numpy', 'dtype'): _numpy_dtype,
    # NumPy 1 and 2.
    **{('numpy.core.multiarray', name): value for name, value in _NUMPY.items()},
    **{('numpy._core.multiarray', name): value for name, value in _NUMPY.items()},
    (_HISTORY, 'HistoryBuffer'): HistoryBuffer,
    **{
        (_HISTORY, f'HistoryBuffer.{name}'): None
        for name in ('min', 'max', 'current', 'mean')
    },
    ('yacs.config', 'CfgNode'): dict,
    ('argparse', 'Namespace'): dict,
    ('mmcv.utils.config', 'ConfigDict'): dict,
    ('mmengine.config.config', 'ConfigDict'): dict,
}
