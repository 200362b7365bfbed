# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A pickle reader that builds data and can do nothing else.

A pickle is a program for a small stack machine: it names functions and classes, and
calls them. Python's own reader imports whatever is named. This reader takes the steps
from :func:`pickletools.genops` of the standard library, which only decodes them. It
carries out the steps that data and tensors need, and looks up names in a fixed table.
Every other step and name is refused. All functions in the table stand in this module
and check their arguments before they build anything.

Two limits keep a small file from using up time or memory: :data:`MAX_STEPS` bounds the
work, :data:`MAX_DEPTH` the nesting.
"""

import io
import math
import pickletools
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import IO, Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from ..compat.pytorch import METADATA
from ..utils.text import printable

#: Budget of one pickle, in steps; three times the pickle's bytes if that is more.
#: Expensive steps count several times (a tensor takes about 150), and so do the bytes
#: and items that a step copies. The written-out content has at most MAX_STEPS objects.
MAX_STEPS = 10_000_000
#: How files of PyTorch before 1.6 begin.
OLD_FORMAT = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
#: Largest depth of containers in containers. Python code that prints or copies such
#: containers fails, or crashes, at some hundreds.
MAX_DEPTH = 100
# Limits of dict keys and set items. Python computes the hash of a number modulo
# 2**61 - 1, so a file could choose larger numbers that all have the same hash.
_MAX_KEY = 1 << 60
_MAX_KEY_LENGTH = 4096
_MAX_KEYS = 8
# Limits of tensor and array shapes. NumPy 1 has 32 axes at most.
_MAX_LENGTH = 1 << 48
_MAX_AXES = 32
# Rows of an empty tensor or array: `tolist` makes a list of each.
_MAX_EMPTY_ROWS = 1 << 20
# Number of bytes of a tensor to read at once.
_PART = 1 << 24


class Refused(Exception):
    """A pickle asks for more than data. The message names what it asks for."""


@dataclass
class Storage:
    """Memory that several tensors may share.

    Attributes:
        memory (Tensor, optional): The bytes, uint8 of shape (N,). None means that
            tensors are not read; they become None.
        dtype (torch.dtype): Type of the numbers in it.
    """

    memory: Optional[Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class StorageType:
    """What a pickle gets for a class such as ``torch.FloatStorage``."""

    dtype: torch.dtype


@dataclass
class _Dtype:
    """A NumPy dtype whose byte order may still change.

    A pickle makes a dtype first and sets its byte order afterwards. Doing this to
    NumPy's own object would change all arrays that use the object.
    """

    dtype: np.dtype


LoadStorage = Callable[[StorageType, str, int], Optional[Storage]]
"""Function that returns the storage for a type, a key and a number of elements."""


class _Stream(io.BytesIO):
    """Bytes with short lines. Python takes quadratic time to read a long number."""

    def readline(self, size: Optional[int] = None) -> bytes:
        return super().readline(1000)


class Unpickler:
    """Reads pickles of protocols 2 to 5 that follow each other.

    Args:
        data (bytes): The pickles.
        load_storage (Callable, optional): Function that returns the storages of
            tensors. None refuses tensors. Defaults to None.
        names (Mapping, optional): Functions that a pickle may call in addition to
            those of this module, by (module, name). Defaults to None.
        max_steps (int, optional): Budget of each pickle. None means
            :data:`MAX_STEPS`, or three times the bytes. Defaults to None.
    """

    def __init__(
        self,
        data: bytes,
        load_storage: Optional[LoadStorage] = None,
        names: Optional[Mapping[Tuple[str, str], Callable]] = None,
        max_steps: Optional[int] = None,
    ) -> None:
        self._stream = _Stream(data)
        self._max_steps = max_steps or max(MAX_STEPS, 3 * len(data))
        self._load_storage = load_storage
        self._names = {**_NAMES, **(names or {})}

    def load(self) -> Any:
        """Read the next pickle.

        Returns:
            The content. Its containers are nested at most MAX_DEPTH deep and contain
            no cycles.

        Raises:
            Refused: If the pickle asks for more than data.
            Exception: Of any kind, if the pickle is damaged.
        """
        self._stack: List[Any] = []
        self._marks: List[int] = []
        self._memo: List[Any] = []
        self._steps = 0
        for opcode, argument, _ in pickletools.genops(self._stream):
            if opcode.name != 'STOP':
                self._spend(_COSTS.get(opcode.name, 1))
                self._step(opcode.name, argument)
        content = self._stack.pop()
        _require_bounded(content, {})
        return content

    def read(self, count: int) -> bytes:
        """Take the bytes behind the last pickle.

        Args:
            count (int): Number of bytes.

        Raises:
            EOFError: If there are fewer.
        """
        data = self._stream.read(count)
        if len(data) < count:
            raise EOFError('the pickle ends too early')
        return data

    def _step(self, name: str, argument: Any) -> None:
        """Carry out a step. :mod:`pickletools` explains what each one does."""
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in ('BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            place = len(self._memo) if argument is None else argument
            if place > len(self._memo):  # Python numbers the memo without gaps
                raise ValueError('a memo that skips numbers')
            self._memo[place : place + 1] = [stack[-1]]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(self._memo[argument])
        elif name == 'MARK':
            self._marks.append(len(stack))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ('TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'):
            stack.append(tuple(self._pop(name)))
        elif name in ('APPEND', 'APPENDS'):
            items = self._pop(name)
            self._target(list).extend(items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = self._pop(name)
            target = self._target(dict)
            self._pay_for_keys(items[::2], target)
            for key, value in zip(items[::2], items[1::2]):
                target[key] = value
        elif name == 'ADDITEMS':
            items = self._pop(name)
            self._pay_for_keys(items, self._target(set))
            stack[-1].update(items)
        elif name == 'FROZENSET':
            items = self._pop(name)
            self._pay_for_copies([items])
            stack.append(_frozen_set(items))
        elif name == 'GLOBAL':
            self._find(*argument.split(' ', 1))
        elif name == 'STACK_GLOBAL':
            self._find(*self._pop(name))
        elif name in ('REDUCE', 'NEWOBJ'):  # a class is called as a function is
            self._call(*self._pop(name))
        elif name == 'BUILD':
            self._set_state(*self._pop(name))
        elif name == 'BINPERSID':
            self._refer_to_storage(*self._pop(name))
        elif name == 'PROTO':
            if not 2 <= argument <= 5:
                raise Refused(f'protocol {argument} of pickle')
        elif name != 'FRAME':
            raise Refused(f'pickle.{name}, a step that plain data do not need')

    def _pop(self, name: str) -> List[Any]:
        """Take from the stack what a step needs: a fixed number, or since the mark."""
        start = len(self._stack) - _TAKES[name] if name in _TAKES else self._marks.pop()
        if start < 0:
            raise IndexError('the stack is empty')
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _target(self, kind: type) -> Any:
        """Return the container that a step fills. Refuse tensors and other objects."""
        target = self._stack[-1]
        if not isinstance(target, kind):
            raise Refused(f'items of a {type(target).__name__}')
        return target

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > self._max_steps:
            raise Refused(f'more than {self._max_steps:,} steps')

    def _pay_for_keys(self, keys: Sequence[Any], target: Collection) -> None:
        """Check new keys of a dict or set, and pay for collisions in its hash table.

        Numbers can be chosen such that each one collides with many others. The hash of
        a text is random.
        """
        _require_keys(keys)
        count = sum(not isinstance(key, str) for key in keys)
        self._spend(count * (2 * len(target) + count) // 200)

    def _pay_for_copies(self, values: Iterable[Any]) -> None:
        """Pay for what is copied. Copies of one text could fill any memory."""
        for value in values:
            if isinstance(value, _CONTAINERS):
                # The copy may be a set of numbers that collide.
                self._spend(10 * len(value) + len(value) ** 2 // 200)
            elif isinstance(value, (str, bytes, bytearray)):
                self._spend(len(value))
            elif isinstance(value, np.ndarray):
                self._spend(value.nbytes)

    def _find(self, module: Any, name: Any) -> None:
        require_types(str, module, name)
        if (module, name) not in self._names:
            raise Refused(printable(f'{module}.{name}'))
        self._stack.append(self._names[module, name])

    def _call(self, called: Any, arguments: Any) -> None:
        """Call a function of the table, or what the table has for a class."""
        is_class = isinstance(called, type) and called in _CLASSES
        # No step makes functions, so a function is one of the table.
        if not is_class and not isinstance(called, FunctionType):
            raise Refused(f'a call of {printable(getattr(called, "__name__", called))}')
        require_types(tuple, arguments)
        self._pay_for_copies(arguments)
        make, types = _CLASSES[called] if is_class else (called, object)
        require_types(types, *arguments)
        self._stack.append(make(*arguments))

    def _set_state(self, state: Any) -> None:
        """Set the state of the last object, if the state of its type is only data."""
        target = self._stack[-1]
        restore = _RESTORE.get(type(target))
        if restore is None or type(state) not in (tuple, dict):
            raise Refused(f'setting the state of a {type(target).__name__}')
        self._pay_for_copies([state])
        self._pay_for_copies(state.values() if type(state) is dict else state)
        restore(target, state)

    def _refer_to_storage(self, reference: Any) -> None:
        """Push the storage that a reference names."""
        # Taking apart a tensor of millions of elements takes minutes, and so do many
        # references to one long tuple.
        require_types(tuple, reference)
        if len(reference) > 6:
            raise Refused('a storage with too long a reference')
        # The fourth part is the device of the tensors, which does not matter. In plain
        # pickles there is a sixth part, for views.
        _, kind, key, _, numel, *view = reference
        require_types(StorageType, kind)
        require_types(str, key)
        _require_lengths(numel)
        if self._load_storage is None or any(part is not None for part in view):
            raise Refused('a storage, or a view of one')
        self._stack.append(self._load_storage(kind, key, numel))


def storage_from_bytes(data: Any) -> Storage:
    """Read a storage as plain pickles hold it (``torch.storage._load_from_bytes``).

    Args:
        data (bytes): A storage in the file format of PyTorch before 1.6: five pickles,
            the number of elements (int64), and the elements.

    Raises:
        Refused: If the bytes ask for more.
        Exception: Of any kind, if the bytes are damaged.
    """
    require_types(bytes, data)
    if not data.startswith(OLD_FORMAT):
        raise Refused('a storage in another format')
    found: List[Tuple[torch.dtype, int]] = []

    def note(kind: StorageType, key: str, length: int) -> None:
        found.append((kind.dtype, length))

    # A storage takes a few dozen steps. The outer pickle pays for all of these bytes.
    stream = Unpickler(data, note, max_steps=1000)
    for _ in range(5):
        stream.load()
    if len(found) != 1:
        raise Refused('something else than a storage')
    ((dtype, length),) = found
    if int.from_bytes(stream.read(8), 'little') != length:
        raise ValueError('a storage of another length than it says')
    content = stream.read(length * dtype.itemsize)
    return Storage(read_memory(io.BytesIO(content), len(content), dtype), dtype)


def read_memory(stream: IO[bytes], count: int, dtype: torch.dtype) -> Tensor:
    """Read bytes into a tensor, uint8 of shape (N,).

    Booleans have to be 0 or 1. PyTorch adds up the bytes of a mask to learn how many
    elements it selects. With larger bytes it writes less or more than it reserved.

    Args:
        stream (IO[bytes]): Where the bytes come from.
        count (int): Number of bytes.
        dtype (torch.dtype): What the bytes are said to be.

    Raises:
        EOFError: If there are fewer bytes.
        ValueError: If ``dtype`` is bool and a byte is neither 0 nor 1.
    """
    memory = torch.empty(count, dtype=torch.uint8)
    # In parts, so that there are never two copies of a large tensor.
    for part in memory.split(_PART):
        content = stream.read(len(part))
        if len(content) < len(part):
            raise EOFError('the bytes of a tensor end too early')
        part.numpy()[:] = np.frombuffer(content, np.uint8)
    if dtype == torch.bool and (memory > 1).any():
        raise ValueError('booleans that are neither true nor false')
    return memory


def require_types(types: Any, *values: Any) -> None:
    """Refuse values of other types than the given one, or ones."""
    for value in values:
        if not isinstance(value, types):
            raise Refused(f'a value of type {type(value).__name__} as argument')


def _require_bounded(
    value: Any, known: Dict[int, Tuple[int, int]], depth: int = 0
) -> Tuple[int, int]:
    """Refuse content that Python cannot print, compare or copy.

    Cycles and deep nesting are two cases. A list that holds one list twice, which holds
    another list twice and so on is the third: every level doubles what is printed.

    Args:
        value (Any): The content, or a part of it.
        known (dict): Results for the containers that were looked at, by ``id``.
        depth (int): Number of containers around the value. Defaults to 0.

    Returns:
        tuple[int, int]: Levels of containers below and including the value, and the
        number of objects in it.
    """
    if isinstance(value, _PARTS):
        raise Refused('a part of a tensor or an array by itself')
    if not isinstance(value, _CONTAINERS) or not value:
        return 0, 1
    levels, size = known.get(id(value), (1, 1))
    if depth + levels > MAX_DEPTH:
        raise Refused(f'containers in containers, more than {MAX_DEPTH} deep')
    if id(value) not in known:
        known[id(value)] = MAX_DEPTH, 1  # a cycle comes back here, and is too deep
        # The keys of a dict are no containers, or tuples of texts.
        for item in value.values() if isinstance(value, dict) else value:
            below, inside = _require_bounded(item, known, depth + 1)
            levels, size = max(levels, 1 + below), size + inside
        if size > MAX_STEPS:
            raise Refused(f'more than {MAX_STEPS:,} objects, written out')
        known[id(value)] = levels, size
    return levels, size


# Without deque and defaultdict: Python crashes when it frees deeply nested ones. Both
# are read as list and dict.
_CONTAINERS = (list, tuple, dict, set, frozenset)
# What tensors and arrays are made of is no content.
_PARTS = (Storage, StorageType, _Dtype, FunctionType)


def _require_lengths(*values: Any) -> None:
    """Refuse values that cannot be a size, a stride or an offset."""
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_LENGTH:
            raise ValueError('a size, stride or offset that is none')


def _require_shape(*shapes: Any) -> None:
    """Refuse values that cannot be the sizes or strides of all axes."""
    for shape in shapes:
        if type(shape) not in (tuple, torch.Size) or len(shape) > _MAX_AXES:
            raise ValueError('a shape that is none')
        _require_lengths(*shape)


def _require_few_rows(size: Sequence[int]) -> None:
    """Refuse sizes such as (2**40, 0), for which a file needs no bytes."""
    if 0 in size and math.prod(size[: size.index(0)]) > _MAX_EMPTY_ROWS:
        raise Refused('an empty tensor or array of many rows')


def _require_keys(keys: Iterable[Any]) -> None:
    """Refuse dict keys and set items other than texts, numbers and tuples of texts.

    Tuples and text are short, because their hash takes time, and for tuples anew each
    time. NaN is refused because it never equals itself.
    """
    for key in keys:
        if type(key) is tuple:
            fine = len(key) <= _MAX_KEYS and all(
                type(x) is str and len(x) <= _MAX_KEY_LENGTH for x in key
            )
        elif isinstance(key, (int, float)):
            fine = abs(key) < _MAX_KEY or abs(key) == math.inf
        elif isinstance(key, (str, bytes)):
            fine = len(key) <= _MAX_KEY_LENGTH
        else:
            fine = key is None
        if not fine:
            raise Refused(f'a key of type {type(key).__name__}, or too large a key')


def _encode(text: Any, encoding: Any) -> bytes:
    """``_codecs.encode``, with which protocol 2 writes bytes."""
    require_types(str, text, encoding)
    if encoding != 'latin1':
        raise Refused(f'the encoding {printable(encoding)}')
    return text.encode('latin1')


def _bytearray(content: Any = b'', encoding: Any = 'latin-1') -> bytearray:
    if isinstance(content, str) and encoding == 'latin-1':
        content = content.encode('latin-1')
    require_types(bytes, content)  # a number would ask for so much memory
    return bytearray(content)


def _set(values: Any = ()) -> set:
    return set(_frozen_set(values))


def _frozen_set(values: Any = ()) -> frozenset:
    _require_keys(values)
    return frozenset(values)


def _deque(values: Any = (), max_length: Any = None) -> list:
    return list(values)


def _counter(content: Any = ()) -> Counter:
    counter: Counter = Counter()
    dict.update(counter, content)  # Counter.update adds the values
    return counter


def _statistics_method(owner: Any, name: Any) -> None:
    """``getattr``, with which protocol 2 writes the methods of a HistoryBuffer.

    The class has these methods anyway, so none is returned.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise Refused('builtins.getattr')


def _numpy_dtype(name: Any, align: Any = False, copy: Any = True) -> _Dtype:
    # Numbers, booleans and text; no objects, records or dates.
    if type(name) is not str or not re.fullmatch('[biufcSU][1-9][0-9]{0,8}', name):
        raise Refused('a NumPy array of something else than numbers or text')
    return _Dtype(np.dtype(name))


def _numpy_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """An array that its state fills."""
    return np.empty(0)


def _numpy_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _elements(data, dtype, shape).reshape(shape, order=order)


def _numpy_scalar(dtype: Any, data: Any) -> np.generic:
    return _elements(data, dtype, ())[0]


def _elements(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """The elements of an array as one row, in their own memory."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
        raise Refused('a NumPy array of objects')
    _require_shape(shape)
    _require_few_rows(shape)
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError(f'a NumPy array that {len(data)} bytes do not fill')
    if dtype.dtype.kind == 'b' and data.strip(b'\0\1'):
        raise ValueError('booleans that are neither true nor false')
    elements = np.frombuffer(bytearray(data), dtype.dtype)
    if elements.dtype.kind == 'U':
        codes = elements.view(f'{elements.dtype.byteorder}u4')
        if (codes > sys.maxunicode).any():  # Python fails when it makes text of them
            raise ValueError('text with characters that Unicode does not have')
    return elements


def _size(values: Any) -> torch.Size:
    _require_shape(tuple(values))
    return torch.Size(values)


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    backward_hooks: Any = None,  # always empty
    metadata: Any = None,
) -> Optional[Tensor]:
    """``_rebuild_tensor`` and ``_rebuild_tensor_v2``: a view of a storage."""
    require_types(Storage, storage)
    return _view(storage, storage.dtype, offset, size, stride, requires_grad, metadata)


_NUMBERS = r'torch\.(u?int(8|16|32|64)|float(16|32|64)|bfloat16|float8_\w+)'


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    backward_hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Optional[Tensor]:
    """``_rebuild_tensor_v3``: a view of bytes, for dtypes without a storage class."""
    require_types(Storage, storage)
    require_types(torch.dtype, dtype)
    if not re.fullmatch(_NUMBERS, str(dtype)):
        raise Refused(f'a tensor of {dtype}')
    return _view(storage, dtype, offset, size, stride, requires_grad, metadata)


def _view(
    storage: Storage,
    dtype: torch.dtype,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    metadata: Any,
) -> Optional[Tensor]:
    """A tensor that lies within a storage, or None if storages are not read."""
    if metadata:
        raise Refused('a view that negates or conjugates')
    _require_shape(size, stride)
    _require_few_rows(size)
    _require_lengths(offset)
    if len(size) != len(stride):
        raise ValueError('a tensor of other sizes than strides')
    if storage.memory is None:
        return None
    available = storage.memory.numel() // dtype.itemsize
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # Such a tensor repeats elements (expand). A copy of it can be of any size.
    if elements > available:
        raise Refused('a tensor of more elements than its storage has')
    if offset > available or (elements and last >= available):
        raise ValueError(f'a tensor beyond its storage of {available} elements')
    if math.prod(n or 1 for n in size) >= _MAX_LENGTH:
        raise ValueError('an empty tensor of too many elements')
    tensor = torch.empty((0,), dtype=dtype, device=storage.memory.device)
    # Not a view of `memory`, which could not be trained.
    tensor.set_(storage.memory.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _parameter(
    data: Any, requires_grad: Any, backward_hooks: Any
) -> Optional[nn.Parameter]:
    require_types((Tensor, type(None)), data)
    return None if data is None else nn.Parameter(data, requires_grad)


def _set_dict(target: dict, state: Any) -> None:
    """Add the values of an argparse.Namespace, without the internals of yacs."""
    require_types(dict, state)
    dict.update(target, {key: x for key, x in state.items() if key[:2] != '__'})


def _set_ordered_dict(target: OrderedDict, state: Any) -> None:
    """Set the versions of modules, which PyTorch keeps beside their weights."""
    require_types(dict, state)
    modules = state.get(METADATA, {})
    require_types(dict, modules)
    require_types(dict, *modules.values())
    for versions in modules.values():
        require_types((int, type(None)), *versions.values())
        # Modules that share a large dict would multiply it.
        if len(versions) > _MAX_KEYS:
            raise Refused('a module of many versions')
    # A copy, because the pickle could change the original after this check.
    copied = OrderedDict((name, dict(versions)) for name, versions in modules.items())
    if METADATA in state:
        setattr(target, METADATA, copied)


def _set_history(target: HistoryBuffer, state: Any) -> None:
    max_length = state['max_length']
    logs, counts = state['_log_history'], state['_count_history']
    require_types(int, max_length)
    require_types(np.ndarray, logs, counts)
    if max_length < 1 or not logs.shape == counts.shape == (logs.size,):
        raise ValueError('a HistoryBuffer without a history')
    if logs.dtype.kind not in 'biuf' or counts.dtype.kind not in 'biuf':
        raise ValueError('a HistoryBuffer of text')
    target.__setstate__(
        dict(
            max_length=max_length,
            _log_history=logs.copy(),
            _count_history=counts.copy(),
        )
    )


def _set_numpy_dtype(target: _Dtype, state: Any) -> None:
    """Set the byte order. All else has to be as NumPy writes it for this dtype."""
    for dtype in (target.dtype.newbyteorder('<'), target.dtype.newbyteorder('>')):
        expected = dtype.__reduce__()[2]
        # A tensor in the state could be equal to anything.
        if list(map(type, state)) == list(map(type, expected)) and state == expected:
            target.dtype = dtype
            return
    raise ValueError('a NumPy dtype with a state that it cannot have')


def _set_numpy_array(target: Any, state: Any) -> None:
    _, shape, dtype, is_fortran, data = state
    array = _elements(data, dtype, shape).reshape(
        shape, order='F' if is_fortran is True else 'C'
    )
    target.__setstate__(array.__reduce__()[2])


# Steps whose value stands in the pickle itself. LONG4, for integers of more than 255
# bytes, is missing: Python takes quadratic time to print them.
_VALUES = frozenset(
    (
        *('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT'),
        *('SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8'),
        *('SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
    )
)
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY: Dict[str, Callable] = {
    'EMPTY_LIST': list,
    'EMPTY_TUPLE': tuple,
    'EMPTY_DICT': dict,
    'EMPTY_SET': set,
}
# How many values a step takes from the stack. Other steps take all since the last mark.
_TAKES = {
    **dict.fromkeys(('TUPLE1', 'APPEND', 'BUILD', 'BINPERSID'), 1),
    **dict.fromkeys(('TUPLE2', 'SETITEM', 'STACK_GLOBAL', 'REDUCE', 'NEWOBJ'), 2),
    'TUPLE3': 3,
}
# Steps that take more time or memory than others.
_COSTS = {
    **dict.fromkeys([*_EMPTY, 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'BINPERSID'], 3),
    **dict.fromkeys(['EMPTY_SET', 'FROZENSET', 'BUILD'], 10),
    **dict.fromkeys(['REDUCE', 'NEWOBJ'], 20),
}

_RESTORE: Dict[type, Callable] = {
    dict: _set_dict,
    Counter: _set_dict,
    OrderedDict: _set_ordered_dict,
    HistoryBuffer: _set_history,
    _Dtype: _set_numpy_dtype,
    np.ndarray: _set_numpy_array,
}

_BUILTINS: Dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(bool, bytearray, bytes, complex, dict, float, frozenset, int, list),
        *(set, slice, str, tuple),
    )
}
_NONE = type(None)
# What a call of a class calls, and the types of its arguments: () allows none. A class
# that is not called is a value.
_CLASSES: Dict[type, Tuple[Callable, Any]] = {
    bytes: (bytes, ()),
    bytearray: (_bytearray, (bytes, str)),
    complex: (complex, float),
    dict: (dict, dict),
    frozenset: (_frozen_set, (list, tuple)),
    set: (_set, (list, tuple)),
    slice: (slice, (int, _NONE)),
    Counter: (_counter, dict),
    OrderedDict: (OrderedDict, ()),
    defaultdict: (lambda factory=None: {}, (type, _NONE)),
    deque: (_deque, (list, tuple, int, _NONE)),
    HistoryBuffer: (lambda: HistoryBuffer.__new__(HistoryBuffer), ()),
    np.dtype: (_numpy_dtype, (str, int)),
    torch.Size: (_size, (list, tuple)),
    torch.device: (torch.device, (str, int)),
}
_HISTORY = 'mmengine.logging.history_buffer'
# The names that a pickle may ask for, and what it gets.
_NAMES: Dict[Tuple[str, str], Any] = {
    **{('builtins', name): kind for name, kind in _BUILTINS.items()},
    # Protocol 2, which torch.save uses, writes Python 2's names.
    **{('__builtin__', name): kind for name, kind in _BUILTINS.items()},
    ('__builtin__', 'long'): int,
    ('__builtin__', 'unicode'): str,
    ('builtins', 'getattr'): _statistics_method,
    ('__builtin__', 'getattr'): _statistics_method,
    ('_codecs', 'encode'): _encode,
    **{
        ('collections', kind.__name__): kind
        for kind in (Counter, OrderedDict, defaultdict, deque)
    },
    ('torch', 'Size'): torch.Size,
    ('torch', 'device'): torch.device,
    **{
        ('torch', str(value).split('.')[-1]): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    },
    **{
        ('torch', f'{name}Storage'): StorageType(dtype)
        for name, dtype in dict(
            Double=torch.float64,
            Float=torch.float32,
            Half=torch.float16,
            BFloat16=torch.bfloat16,
            Long=torch.int64,
            Int=torch.int32,
            Short=torch.int16,
            Char=torch.int8,
            Byte=torch.uint8,
            Bool=torch.bool,
            ComplexDouble=torch.complex128,
            ComplexFloat=torch.complex64,
        ).items()
    },
    ('torch.storage', 'UntypedStorage'): StorageType(torch.uint8),
    ('torch._utils', '_rebuild_tensor'): _tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_tensor_v3'): _tensor_v3,
    ('torch._utils', '_rebuild_parameter'): _parameter,
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
    # Of NumPy 1 and 2.
    **{
        (f'numpy.{core}.{module}', name): function
        for core in ('core', '_core')
        for module, name, function in (
            ('multiarray', '_reconstruct', _numpy_array),
            ('multiarray', 'scalar', _numpy_scalar),
            ('numeric', '_frombuffer', _numpy_from_buffer),
        )
    },
    (_HISTORY, 'HistoryBuffer'): HistoryBuffer,
    **{
        (_HISTORY, f'HistoryBuffer.{name}'): None
        for name in ('min', 'max', 'current', 'mean')
    },
    # Configs become dicts, so that these packages are not needed.
    ('yacs.config', 'CfgNode'): dict,
    ('argparse', 'Namespace'): dict,
    ('mmcv.utils.config', 'ConfigDict'): dict,
    ('mmengine.config.config', 'ConfigDict'): dict,
}
