# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A reader of pickles that makes data of them, and can do nothing else.

A pickle is a program: it names functions and classes, and calls them. Python's reader
imports what is named. This one knows the steps that plain data and tensors need, and a
table of names; both are below, and whatever they do not have is refused. What a pickle
calls is always code of this module, which looks at its arguments first.
"""

import math
import pickle
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from ..compat.pytorch import METADATA
from ..utils.text import printable

#: What one pickle may cost: its steps, of which dear ones count several times, and what
#: they copy; three times its bytes, if that is more. A tensor takes 150. It bounds the
#: objects of what it holds, written out, too.
MAX_STEPS = 10_000_000
#: Containers in containers. Python's own code fails, or crashes, at some hundreds.
MAX_DEPTH = 100
# A seed has 8. Python takes quadratic time to print an integer.
_MAX_INT_BYTES = 128
_MAX_LENGTH = 1 << 48
_MAX_AXES = 32
# Elements that calls may copy, as a multiple of the pickle's bytes. Arrays are copied
# twice, and the shortest reference to a short word is two bytes long.
_MAX_COPIES = 10


class Refused(Exception):
    """A pickle asks for more than data; says for what."""


@dataclass
class Storage:
    """Memory that tensors share.

    Attributes:
        memory (Tensor, optional): Its bytes, uint8 of shape (N,). None if tensors are
            not to be read.
        dtype (torch.dtype): Of the tensors that do not say theirs.
    """

    memory: Optional[Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class StorageType:
    """What a class such as ``torch.FloatStorage`` is in a pickle."""

    dtype: torch.dtype


@dataclass
class _Dtype:
    """A NumPy dtype in the making.

    NumPy's own would change under the arrays that use it when its state is set, and
    believes a size that is wrong.
    """

    name: str
    order: str = '='

    def made(self) -> np.dtype:
        return np.dtype(self.name).newbyteorder(self.order)


LoadStorage = Callable[[StorageType, str, int], Storage]
"""Makes the storage of a type, a key and a number of elements."""


class Unpickler:
    """Reads pickles of protocols 2 to 5, one behind the other.

    Args:
        data (bytes): The pickles.
        load_storage (Callable): Makes the storages that they refer to. None allows
            none. Defaults to None.
        names (Mapping, optional): What to find under names, (module, name), beside
            the table of this module. Their values are called if they are functions.
            Defaults to None.
        max_steps (int, optional): Most steps of a pickle. None means MAX_STEPS.
            Defaults to None.
    """

    def __init__(
        self,
        data: bytes,
        load_storage: Optional[LoadStorage] = None,
        names: Optional[Mapping[Tuple[str, str], Callable]] = None,
        max_steps: Optional[int] = None,
    ) -> None:
        self._data = data
        self._max_steps = max_steps or max(MAX_STEPS, 3 * len(data))
        self._position = 0
        self._copied = 0
        self._load_storage = load_storage
        self._names = {**_NAMES, **names} if names else _NAMES
        self._calls = _CALLS
        if names:
            self._calls = {**_CALLS, **{id(call): call for call in names.values()}}

    def load(self) -> Any:
        """Read the next pickle.

        Returns:
            What it holds: containers in containers at most MAX_DEPTH deep, and without
            cycles.

        Raises:
            Refused: If it asks for more than data.
            Exception: Of any kind, if the pickle is damaged.
        """
        self._stack: List[Any] = []
        self._marks: List[int] = []
        self._memo: List[Any] = []
        self._steps = 0
        while True:
            opcode = self.read(1)
            if opcode == pickle.STOP:
                content = self._stack.pop()
                _require_bounded(content)
                return content
            self._spend(_COSTS.get(opcode, 1))
            self._step(opcode)

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > self._max_steps:
            raise Refused(f'more than {self._max_steps:,} steps')

    def read(self, count: int) -> bytes:
        """Take the next bytes.

        Raises:
            EOFError: If there are fewer.
        """
        end = self._position + count
        if end > len(self._data):
            raise EOFError('the pickle ends too early')
        data = self._data[self._position : end]
        self._position = end
        return data

    def _step(self, opcode: bytes) -> None:
        push = self._stack.append
        if opcode in _CONSTANTS:
            push(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            push(_EMPTY[opcode]())
        elif opcode in _NUMBERS:
            push(self._number(_NUMBERS[opcode]))
        elif opcode in _TEXTS:
            size, convert = _TEXTS[opcode]
            push(convert(self.read(self._number(size))))
        elif opcode in _TUPLES:
            push(self._pop(_TUPLES[opcode]))
        elif opcode in _PUT:
            self._put(self._number(_PUT[opcode]))
        elif opcode in _GET:
            push(self._memo[self._number(_GET[opcode])])
        elif opcode in self._STEPS:
            self._STEPS[opcode](self)
        else:
            raise Refused(f'{_opcode_name(opcode)}, a step that plain data do not need')

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def _pop(self, count: int) -> Tuple:
        """Take the last values from the stack."""
        if count > len(self._stack):
            raise IndexError('the stack is empty')
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def _pop_mark(self) -> List[Any]:
        """Take what is on the stack since the last mark."""
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _protocol(self) -> None:
        version = self._number('<B')
        if not 2 <= version <= 5:
            raise Refused(f'protocol {version} of pickle')

    def _frame(self) -> None:
        self._number('<Q')  # its length, for readers of streams

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def _put(self, number: int) -> None:
        # Python counts them.
        if number > len(self._memo):
            raise ValueError('a memo that skips numbers')
        self._memo[number : number + 1] = [self._stack[-1]]

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _append(self) -> None:
        self._extend(self._pop(1))

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: Iterable[Any]) -> None:
        self._target(list).extend(values)

    def _set_item(self) -> None:
        self._set_pairs(self._pop(2))

    def _set_items(self) -> None:
        self._set_pairs(self._pop_mark())

    def _set_pairs(self, pairs: Iterable[Any]) -> None:
        target = self._target(dict)
        for key, value in zip(pairs[::2], pairs[1::2]):
            self._pay_for_key(key, len(target))
            target[_key(key)] = value

    def _add_items(self) -> None:
        items = self._pop_mark()
        target = self._target(set)
        for item in items:
            self._pay_for_key(item, len(target))
            target.add(_key(item))

    def _frozen_set(self) -> None:
        items = self._pop_mark()
        self._pay_for_copy(items)
        self._stack.append(frozenset(map(_key, items)))

    def _pay_for_key(self, key: Any, size: int) -> None:
        # Numbers can be chosen such that each meets many others in the table.
        if not isinstance(key, str):
            self._spend(size // 100)

    def _pay_for_copy(self, container: Any) -> None:
        """As if all its items were keys, and numbers."""
        self._spend(10 * len(container) + len(container) ** 2 // 200)

    def _target(self, *kinds: type) -> Any:
        """What is changed. A tensor, say, does other things with items."""
        target = self._stack[-1]
        if not isinstance(target, kinds):
            raise Refused(f'items of a {type(target).__name__}')
        return target

    def _global(self) -> None:
        names = []
        for _ in range(2):
            end = self._data.index(b'\n', self._position)
            names.append(self.read(end - self._position).decode())
            self.read(1)
        self._find(*names)

    def _stack_global(self) -> None:
        self._find(*self._pop(2))

    def _find(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError('a name that is no text')
        if (module, name) not in self._names:
            raise Refused(printable(f'{module}.{name}'))
        self._stack.append(self._names[module, name])

    def _reduce(self) -> None:
        called, args = self._pop(2)
        call = self._calls.get(id(called))
        if call is None or not isinstance(args, tuple):
            raise Refused(f'a call of {printable(getattr(called, "__name__", called))}')
        self._count_copies(args)
        if call is storage_from_bytes:  # pickles of their own
            self._spend(500)
        self._stack.append(call(*args))

    def _build(self) -> None:
        """Set the state of an object, of those kinds whose state is data alone."""
        (state,) = self._pop(1)
        target = self._stack[-1]
        for kind, restore in _RESTORE.items():
            if isinstance(target, kind) and type(state) in (tuple, dict):
                # The state first, which pays for looking at its items.
                self._count_copies((state,))
                self._count_copies(state.values() if type(state) is dict else state)
                restore(target, state)
                return
        raise Refused(f'setting the state of a {type(target).__name__}')

    def _count_copies(self, values: Iterable[Any]) -> None:
        """Bound what calls copy: the same text, again and again, fills any memory."""
        for value in values:
            if isinstance(value, _CONTAINERS):
                self._pay_for_copy(value)
            elif isinstance(value, (str, bytes, bytearray)):
                self._copied += len(value)
            elif isinstance(value, np.ndarray):
                self._copied += value.nbytes
        if self._copied > _MAX_COPIES * len(self._data):
            raise Refused('the same content again and again')

    def _persistent(self) -> None:
        # Where it was saved does not matter. PyTorch's older format adds a view.
        ((_, kind, key, _, numel, *view),) = self._pop(1)
        if not isinstance(kind, StorageType) or type(key) is not str:
            raise ValueError('a reference to something else than a storage')
        if self._load_storage is None or any(part is not None for part in view):
            raise Refused('a storage' + ' of a view' * bool(view))
        _require_lengths(numel)
        self._stack.append(self._load_storage(kind, key, numel))

    _STEPS: Dict[bytes, Callable] = {
        pickle.PROTO: _protocol,
        pickle.FRAME: _frame,
        pickle.MARK: _mark,
        pickle.MEMOIZE: _memoize,
        pickle.TUPLE: _tuple,
        pickle.APPEND: _append,
        pickle.APPENDS: _appends,
        pickle.SETITEM: _set_item,
        pickle.SETITEMS: _set_items,
        pickle.ADDITEMS: _add_items,
        pickle.FROZENSET: _frozen_set,
        pickle.GLOBAL: _global,
        pickle.STACK_GLOBAL: _stack_global,
        pickle.REDUCE: _reduce,
        # A class with arguments; here both call our code.
        pickle.NEWOBJ: _reduce,
        pickle.BUILD: _build,
        pickle.BINPERSID: _persistent,
    }


def storage_from_bytes(data: bytes) -> Storage:
    """``torch.storage._load_from_bytes``, by which plain pickles hold tensors.

    Args:
        data (bytes): One storage, as ``torch.save`` wrote it before PyTorch 1.6: five
            pickles, the number of elements (int64), and the elements.

    Raises:
        Refused: If it asks for more.
        Exception: Of any kind, if it is damaged.
    """
    # A few dozen steps make a reference to a storage.
    stream = Unpickler(_of(bytes, data)[0], _claimed, max_steps=1000)
    magic, version, _, storage, keys = (stream.load() for _ in range(5))
    if _of(int, magic, version) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError('a storage in another format')
    if not isinstance(storage, _Claim) or len(_of(list, keys)[0]) != 1:
        raise Refused('something else than a storage')
    length, dtype = storage.length, storage.dtype
    if int.from_bytes(stream.read(8), 'little') != length:
        raise ValueError('a storage of another length than it says')
    content = stream.read(length * dtype.itemsize)
    memory = torch.empty(len(content), dtype=torch.uint8)
    memory.numpy()[:] = np.frombuffer(content, np.uint8)
    require_booleans(memory, dtype)
    return Storage(memory, dtype)


@dataclass
class _Claim:
    """What a reference says of a storage."""

    length: int
    dtype: torch.dtype


def _claimed(kind: StorageType, key: str, length: int) -> _Claim:
    return _Claim(length, kind.dtype)


def require_booleans(memory: Tensor, dtype: torch.dtype) -> None:
    """Refuse bytes that are no booleans where booleans are claimed.

    PyTorch reserves memory for as many results as a mask has ones, and counts them by
    adding its bytes.

    Args:
        memory (Tensor): Bytes, uint8 of shape (N,).
        dtype (torch.dtype): What they are said to be.

    Raises:
        ValueError: If ``dtype`` is bool and a byte is neither 0 nor 1.
    """
    if dtype == torch.bool and (memory > 1).any():
        raise ValueError('booleans that are neither true nor false')


def _require_bounded(content: Any) -> None:
    """Refuse cycles, and nesting that Python cannot print, compare or copy.

    A list of twice the same list, of twice the same list and so on is small in a file
    and doubles with every level when it is written out.
    """
    bounds: Dict[int, Tuple[int, int]] = {}  # depth and size of what is done
    ancestors = set()
    if isinstance(content, _PARTS):
        raise Refused('a part of a tensor or an array by itself')
    todo = [content] if isinstance(content, _CONTAINERS) else []
    total = 0
    while todo:
        node = todo[-1]
        if id(node) in bounds:
            todo.pop()
            continue
        # The keys of a dict hold nothing.
        items = node.values() if isinstance(node, dict) else node
        if any(isinstance(item, _PARTS) for item in items):
            raise Refused('a part of a tensor or an array by itself')
        inner = [item for item in items if isinstance(item, _CONTAINERS) and item]
        if id(node) in ancestors:  # for the second time, with all below it done
            ancestors.remove(id(node))
            below = [bounds[id(item)] for item in inner]
            depth = 1 + max((depth for depth, _ in below), default=0)
            size = len(node) + sum(size for _, size in below)
            if depth > MAX_DEPTH:
                raise Refused(f'containers in containers, more than {MAX_DEPTH} deep')
            if size > MAX_STEPS:
                raise Refused(f'more than {MAX_STEPS:,} objects, written out')
            bounds[id(node)] = depth, size
            continue
        ancestors.add(id(node))
        total += len(node)
        if total > MAX_STEPS:
            raise Refused(f'more than {MAX_STEPS:,} objects')
        if any(id(item) in ancestors for item in inner):
            raise Refused('a container that contains itself')
        todo.extend(item for item in inner if id(item) not in bounds)


# Without deque and defaultdict: nested deeply, they crash Python when they go.
_CONTAINERS = (list, tuple, dict, set, frozenset)
# What tensors and arrays are made of is no content.
_PARTS = (Storage, StorageType, _Dtype, FunctionType)


def _opcode_name(opcode: bytes) -> str:
    names = (name for name in pickle.__all__ if getattr(pickle, name) == opcode)
    return f'pickle.{next(names, opcode.hex())}'


def _require_lengths(*values: Any) -> None:
    """Refuse what cannot be a size, a stride or an offset."""
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_LENGTH:
            raise ValueError('a size, stride or offset that is none')


def _require_shape(*shapes: Any) -> None:
    """Refuse what cannot be sizes or strides."""
    for shape in shapes:
        if type(shape) not in (tuple, torch.Size) or len(shape) > _MAX_AXES:
            raise ValueError('a shape that is none')
        _require_lengths(*shape)


def _key(value: Any) -> Any:
    """A key of a dict or an item of a set that is looked up quickly.

    Python's hash of text is another one in every process. That of a number is the
    number itself: with many of the same hash a dict takes quadratic time.
    """
    if type(value) is tuple and len(value) <= _MAX_KEYS:
        if all(type(x) is str and len(x) <= _MAX_KEY_LENGTH for x in value):
            return value
    elif isinstance(value, (int, float)):
        # NaN is no key twice.
        if abs(value) < _MAX_KEY or abs(value) == math.inf:
            return value
    elif isinstance(value, (str, bytes)):
        if len(value) <= _MAX_KEY_LENGTH:
            return value
    elif value is None:
        return value
    raise Refused(f'a key of type {type(value).__name__}, or too large a key')


_MAX_KEY = 1 << 60
_MAX_KEY_LENGTH = 4096
_MAX_KEYS = 8


def _int(data: bytes) -> int:
    if len(data) > _MAX_INT_BYTES:
        raise Refused(f'an integer of {len(data)} bytes')
    return int.from_bytes(data, 'little', signed=True)


def _text(data: bytes) -> str:
    return data.decode('utf-8', 'surrogatepass')


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``, of which pickles use this for bytes."""
    if encoding != 'latin1':
        raise Refused(f'the encoding {printable(encoding)}')
    return text.encode('latin1')


def _bytes() -> bytes:
    return b''


def _bytearray(content: Any = b'', encoding: str = 'latin-1') -> bytearray:
    if isinstance(content, str) and encoding == 'latin-1':
        content = content.encode('latin-1')
    if not isinstance(content, bytes):  # a number asks for memory
        raise Refused(f'a bytearray of {printable(content)}')
    return bytearray(content)


def _complex(real: float, imaginary: float) -> complex:
    return complex(*_of(float, real, imaginary))


def _slice(*limits: Optional[int]) -> slice:
    return slice(*_of((int, type(None)), *limits))


def _set(values: Any = ()) -> set:
    return set(map(_key, *_of((list, tuple), values)))


def _frozen_set(values: Any = ()) -> frozenset:
    return frozenset(map(_key, *_of((list, tuple), values)))


def _deque(values: Any = (), max_length: Any = None) -> list:
    return list(*_of((list, tuple), values))


def _dict(*content: Any) -> dict:
    return dict(*_of(dict, *content))


def _counter(*content: Any) -> Counter:
    counter = Counter()
    dict.update(counter, *_of(dict, *content))  # its own update adds
    return counter


def _ordered_dict() -> OrderedDict:
    return OrderedDict()


def _default_dict(factory: Any = None) -> dict:
    return {}


def _of(kinds: Any, *values: Any) -> Tuple:
    """Values, of which none is of another type."""
    for value in values:
        if not isinstance(value, kinds):
            raise Refused(f'a value of type {type(value).__name__} as argument')
    return values


def _statistics_method(owner: Any, name: Any) -> None:
    """``getattr``, which HistoryBuffers call for methods that the class has anyway."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise Refused('builtins.getattr')


def _history() -> HistoryBuffer:
    return HistoryBuffer.__new__(HistoryBuffer)


def _numpy_dtype(name: Any, align: Any = False, copy: Any = True) -> _Dtype:
    # Numbers, booleans and text; no objects, records or dates.
    if type(name) is not str or not re.fullmatch('[biufcSU][1-9][0-9]{0,8}', name):
        raise Refused('a NumPy array of something else than numbers or text')
    np.dtype(name)  # raises an error for numbers of a size that there is not
    return _Dtype(name)


def _numpy_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """An array that its state will fill."""
    return np.empty(0)


def _numpy_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _elements(data, dtype, shape).reshape(shape, order=order)


def _numpy_scalar(dtype: Any, data: Any) -> np.generic:
    return _elements(data, dtype, ())[0]


def _elements(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """The elements of an array, in a row, in memory of their own."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
        raise Refused('a NumPy array of objects')
    _require_shape(shape)
    made = dtype.made()
    if math.prod(shape) * made.itemsize != len(data):
        raise ValueError(f'a NumPy array that {len(data)} bytes do not fill')
    if made.kind == 'b' and data.strip(b'\0\1'):
        raise ValueError('booleans that are neither true nor false')
    return np.frombuffer(bytearray(data), made)


def _size(values: Any) -> torch.Size:
    shape = tuple(*_of((list, tuple), values))
    _require_shape(shape)
    return torch.Size(shape)


def _device(*description: Any) -> torch.device:
    return torch.device(*_of((str, int), *description))


def _tensor(storage: Storage, offset: int, size: Tuple, stride: Tuple) -> Any:
    return _view(storage, offset, size, stride, False)


def _tensor_v2(
    storage: Storage,
    offset: int,
    size: Tuple,
    stride: Tuple,
    requires_grad: bool,
    backward_hooks: Any,  # none, always
    metadata: Any = None,
) -> Any:
    if metadata:
        raise Refused('a view that negates or conjugates')
    return _view(storage, offset, size, stride, requires_grad)


_NUMBERS_OF_TENSORS = r'torch\.(u?int(8|16|32|64)|float(16|32|64)|bfloat16|float8_\w+)'


def _tensor_v3(
    storage: Storage,
    offset: int,
    size: Tuple,
    stride: Tuple,
    requires_grad: bool,
    backward_hooks: Any,
    dtype: torch.dtype,
    metadata: Any = None,
) -> Any:
    """A tensor of a dtype that has no class of storages."""
    name = str(*_of(torch.dtype, dtype))
    if metadata or not re.fullmatch(_NUMBERS_OF_TENSORS, name):
        raise Refused(f'a tensor of {name}')
    return _view(storage, offset, size, stride, requires_grad, dtype)


def _view(
    storage: Storage,
    offset: int,
    size: Tuple,
    stride: Tuple,
    requires_grad: bool,
    dtype: Optional[torch.dtype] = None,
) -> Optional[Tensor]:
    """A tensor of a storage, all within it; None if storages are not read."""
    if not isinstance(storage, Storage):
        raise ValueError('a tensor without a storage')
    dtype = dtype or storage.dtype
    _require_shape(size, stride)
    _require_lengths(offset)
    if len(size) != len(stride):
        raise ValueError('a tensor of other sizes than strides')
    if storage.memory is None:
        return None
    available = storage.memory.numel() // dtype.itemsize
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # These would be the same ones again: a number in a file could fill any memory when
    # the tensor is copied.
    if elements > available:
        raise Refused('a tensor of more elements than its storage has')
    if offset > available or (elements and last >= available):
        raise ValueError(f'a tensor beyond its storage of {available} elements')
    if math.prod(n or 1 for n in size) >= _MAX_LENGTH:
        raise ValueError('an empty tensor of too many elements')
    tensor = torch.empty((0,), dtype=dtype, device=storage.memory.device)
    tensor.set_(storage.memory.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _parameter(
    data: Optional[Tensor], requires_grad: bool, backward_hooks: Any
) -> Optional[nn.Parameter]:
    return None if data is None else nn.Parameter(*_of(Tensor, data), requires_grad)


def _set_dict(target: dict, state: Any) -> None:
    """An argparse.Namespace has its values here, a yacs config its internals."""
    values = {key: x for key, x in _of(dict, state)[0].items() if key[:2] != '__'}
    dict.update(target, values)


def _set_ordered_dict(target: OrderedDict, state: Any) -> None:
    """PyTorch keeps the versions of modules beside their weights."""
    if METADATA in _of(dict, state)[0]:
        (of_modules,) = _of(dict, state[METADATA])
        # Anew, so that nothing that is looked at changes later.
        by_module = OrderedDict()
        setattr(target, METADATA, by_module)
        for name, versions in of_modules.items():
            # Modules that share many of them would multiply.
            if len(*_of(dict, versions)) > _MAX_KEYS:
                raise Refused('a module of many versions')
            by_module[name] = dict(versions)
            _of((int, type(None)), *versions.values())


def _set_history(target: HistoryBuffer, state: Any) -> None:
    (max_length,) = _of(int, state['max_length'])
    logs, counts = _of(np.ndarray, state['_log_history'], state['_count_history'])
    # Otherwise it is none that a training has written.
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
    # The byte order alone; sizes and flags say what the name does.
    version, order, base, names, fields, size, alignment, flags = state
    if base is not None or names is not None or fields is not None:
        raise Refused('a NumPy array of objects or records')
    _of(int, version, size, alignment, flags)
    made = np.dtype(target.name)
    by_name = (made.itemsize, made.alignment, made.flags)
    numbers = made.kind not in 'SU' and (-1, -1, made.flags)
    if (size, alignment, flags) not in (by_name, numbers):
        raise ValueError('a NumPy dtype of another size')
    if _of(str, order)[0] not in ('<', '>', '|', '='):
        raise ValueError('a byte order that is none')
    target.order = order


def _set_numpy_array(target: np.ndarray, state: Any) -> None:
    _, shape, dtype, is_fortran, data = state
    elements = _elements(data, dtype, shape)
    target.__setstate__(
        (1, shape, elements.dtype, is_fortran is True, elements.tobytes())
    )


_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_EMPTY = {
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_TUPLE: tuple,
    pickle.EMPTY_DICT: dict,
    pickle.EMPTY_SET: set,
}
_NUMBERS = {
    pickle.BININT: '<i',
    pickle.BININT1: '<B',
    pickle.BININT2: '<H',
    pickle.BINFLOAT: '>d',
}
# The form of the length, and what the bytes become.
_TEXTS: Dict[bytes, Tuple[str, Callable]] = {
    pickle.LONG1: ('<B', _int),
    pickle.LONG4: ('<I', _int),
    pickle.SHORT_BINUNICODE: ('<B', _text),
    pickle.BINUNICODE: ('<I', _text),
    pickle.BINUNICODE8: ('<Q', _text),
    pickle.SHORT_BINBYTES: ('<B', bytes),
    pickle.BINBYTES: ('<I', bytes),
    pickle.BINBYTES8: ('<Q', bytes),
    pickle.BYTEARRAY8: ('<Q', bytearray),
}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_PUT = {pickle.BINPUT: '<B', pickle.LONG_BINPUT: '<I'}
_GET = {pickle.BINGET: '<B', pickle.LONG_BINGET: '<I'}

# Steps that take more time or memory than others.
_COSTS = {
    **dict.fromkeys([*_EMPTY, *_TUPLES, pickle.TUPLE, pickle.BINPERSID], 3),
    **dict.fromkeys([pickle.EMPTY_SET, pickle.FROZENSET, pickle.BUILD], 10),
    **dict.fromkeys([pickle.REDUCE, pickle.NEWOBJ], 20),
}

# OrderedDict before dict, of which it is one.
_RESTORE: Dict[type, Callable] = {
    OrderedDict: _set_ordered_dict,
    dict: _set_dict,
    HistoryBuffer: _set_history,
    _Dtype: _set_numpy_dtype,
    np.ndarray: _set_numpy_array,
}

_BUILTINS = {
    kind.__name__: kind
    for kind in (
        *(bool, bytearray, bytes, complex, dict, float, frozenset, int, list),
        *(set, slice, str, tuple),
    )
}
# What is called for a class, which is a value otherwise.
_CLASSES: Dict[type, Callable] = {
    bytes: _bytes,
    bytearray: _bytearray,
    complex: _complex,
    dict: _dict,
    frozenset: _frozen_set,
    set: _set,
    slice: _slice,
    Counter: _counter,
    OrderedDict: _ordered_dict,
    defaultdict: _default_dict,
    deque: _deque,
    HistoryBuffer: _history,
    np.dtype: _numpy_dtype,
    torch.Size: _size,
    torch.device: _device,
}
_HISTORY = 'mmengine.logging.history_buffer'
_FUNCTIONS: Dict[Tuple[str, str], Callable] = {
    ('_codecs', 'encode'): _encode,
    ('torch._utils', '_rebuild_tensor'): _tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor_v2,
    ('torch._utils', '_rebuild_tensor_v3'): _tensor_v3,
    ('torch._utils', '_rebuild_parameter'): _parameter,
    # Python 2's name for it is also that of pickles in protocol 2, torch.save's.
    **{(name, 'getattr'): _statistics_method for name in ('builtins', '__builtin__')},
    # NumPy 1 and 2.
    **{
        (f'numpy.{core}.{module}', name): function
        for core in ('core', '_core')
        for module, name, function in (
            ('multiarray', '_reconstruct', _numpy_array),
            ('multiarray', 'scalar', _numpy_scalar),
            ('numeric', '_frombuffer', _numpy_from_buffer),
        )
    },
}
# The names that a pickle may ask for, and what it gets.
_NAMES: Dict[Tuple[str, str], Any] = {
    **_FUNCTIONS,
    **{('builtins', name): kind for name, kind in _BUILTINS.items()},
    **{('__builtin__', name): kind for name, kind in _BUILTINS.items()},
    # Python 2's names, which protocol 2 writes.
    ('__builtin__', 'long'): int,
    ('__builtin__', 'unicode'): str,
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
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
    (_HISTORY, 'HistoryBuffer'): HistoryBuffer,
    **{
        (_HISTORY, f'HistoryBuffer.{name}'): None
        for name in ('min', 'max', 'current', 'mean')
    },
    # Their values, without these packages.
    ('yacs.config', 'CfgNode'): dict,
    ('argparse', 'Namespace'): dict,
    ('mmcv.utils.config', 'ConfigDict'): dict,
    ('mmengine.config.config', 'ConfigDict'): dict,
}
# By identity: a pickle may choose the hash and the equality of what it calls.
_CALLS: Dict[int, Callable] = {
    **{id(kind): call for kind, call in _CLASSES.items()},
    **{id(function): function for function in _FUNCTIONS.values()},
}
