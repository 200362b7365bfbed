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
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from .text import printable

#: Steps of one pickle, which bounds its objects, and objects of what it holds written
#: out. Checkpoints of long trainings have some hundred thousand.
MAX_STEPS = 10_000_000
#: Containers in containers. Python's own code fails, or crashes, at some hundreds.
MAX_DEPTH = 100
# A seed has 8. Python takes quadratic time to print an integer.
_MAX_INT_BYTES = 128
_MAX_LENGTH = 1 << 48
# Elements that calls may copy, as a multiple of the pickle's bytes. Arrays are copied
# twice, and the shortest reference to a short word is two bytes long.
_MAX_COPIES = 10


class Refused(Exception):
    """A pickle asks for more than data; says for what."""


class Storage(NamedTuple):
    """Memory that tensors share.

    Attributes:
        memory (Tensor, optional): Its bytes, uint8 of shape (N,). None if tensors are
            not to be read.
        dtype (torch.dtype): Of the tensors that do not say theirs.
    """

    memory: Optional[Tensor]
    dtype: torch.dtype


class StorageType(NamedTuple):
    """What a class such as ``torch.FloatStorage`` is in a pickle."""

    dtype: torch.dtype


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
    """

    def __init__(
        self,
        data: bytes,
        load_storage: Optional[LoadStorage] = None,
        names: Optional[Mapping[Tuple[str, str], Callable]] = None,
    ) -> None:
        self._data = data
        self._position = 0
        self._copied = 0
        self._load_storage = load_storage
        self._names = {**_NAMES, **(names or {})}
        # By identity: a pickle may choose an argument's hash and equality.
        self._calls = {id(kind): call for kind, call in _CALLS.items()}
        self._calls.update((id(call), call) for call in (names or {}).values())

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
        self._memo: Dict[int, Any] = {}
        for _ in range(MAX_STEPS):
            opcode = self.read(1)
            if opcode == pickle.STOP:
                content = self._stack.pop()
                _require_bounded(content)
                return content
            self._step(opcode)
        raise Refused(f'more than {MAX_STEPS:,} objects')

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
            self._memo[self._number(_PUT[opcode])] = self._stack[-1]
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
        self._memo[len(self._memo)] = self._stack[-1]

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _append(self) -> None:
        self._extend(self._pop(1))

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: Iterable[Any]) -> None:
        self._target(list, deque).extend(values)

    def _set_item(self) -> None:
        self._set(self._pop(2))

    def _set_items(self) -> None:
        self._set(self._pop_mark())

    def _set(self, pairs: Iterable[Any]) -> None:
        target = self._target(dict)
        for key, value in zip(pairs[::2], pairs[1::2]):
            target[_key(key)] = value

    def _add_items(self) -> None:
        items = self._pop_mark()
        self._target(set).update(map(_key, items))

    def _frozen_set(self) -> None:
        self._stack.append(frozenset(map(_key, self._pop_mark())))

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
        self._stack.append(call(*args))

    def _build(self) -> None:
        """Set the state of an object, of those kinds whose state is data alone."""
        (state,) = self._pop(1)
        target = self._stack[-1]
        for kind, restore in _RESTORE.items():
            if isinstance(target, kind):
                self._count_copies(state if isinstance(state, tuple) else (state,))
                restore(target, state)
                return
        raise Refused(f'setting the state of a {type(target).__name__}')

    def _count_copies(self, args: Tuple) -> None:
        """Bound what calls copy: the same text, again and again, fills any memory."""
        self._copied += sum(len(arg) for arg in args if isinstance(arg, _COPIED))
        if self._copied > _MAX_COPIES * len(self._data):
            raise Refused('the same content again and again')

    def _persistent(self) -> None:
        # Where it was saved does not matter. PyTorch's older format adds a view.
        ((word, kind, key, _, numel, *view),) = self._pop(1)
        is_storage = word == 'storage' and isinstance(kind, StorageType)
        if not is_storage or not isinstance(key, str) or not _is_length(numel):
            raise ValueError('a reference to something else than a storage')
        if self._load_storage is None or view not in ([], [None]):
            raise Refused('a storage' + ' of a view' * bool(view))
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
    stream = Unpickler(bytes(data), _claimed)
    magic, version, _, storage, keys = (stream.load() for _ in range(5))
    if (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError('a storage in another format')
    if not isinstance(storage, _Claim) or len(keys) != 1:
        raise Refused('something else than a storage')
    length, dtype = storage
    if int.from_bytes(stream.read(8), 'little') != length:
        raise ValueError('a storage of another length than it says')
    content = stream.read(length * dtype.itemsize)
    memory = torch.empty(len(content), dtype=torch.uint8)
    memory.numpy()[:] = np.frombuffer(content, np.uint8)
    require_booleans(memory, dtype)
    return Storage(memory, dtype)


class _Claim(NamedTuple):
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
    todo = [content] if isinstance(content, _CONTAINERS) else []
    while todo:
        node = todo[-1]
        if id(node) in bounds:
            todo.pop()
            continue
        # The keys of a dict hold nothing.
        items = node.values() if isinstance(node, dict) else node
        inner = [item for item in items if isinstance(item, _CONTAINERS)]
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
        if any(id(item) in ancestors for item in inner):
            raise Refused('a container that contains itself')
        todo.extend(item for item in inner if id(item) not in bounds)


_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_COPIED = (*_CONTAINERS, str, bytes, bytearray)


def _opcode_name(opcode: bytes) -> str:
    names = (name for name in pickle.__all__ if getattr(pickle, name) == opcode)
    return f'pickle.{next(names, opcode.hex())}'


def _is_length(value: Any) -> bool:
    """Whether a value can be a size, a stride or an offset of a tensor."""
    return type(value) is int and 0 <= value < _MAX_LENGTH


_SCALARS = (str, bytes, int, float, type(None))


def _key(value: Any) -> Any:
    """A key of a dict or an item of a set: one whose hash takes no time."""
    items = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(item, _SCALARS) for item in items):
        raise Refused(f'a key of type {type(value).__name__}')
    return value


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


def _set(values: List[Any] = ()) -> set:
    return set(map(_key, values))


def _frozen_set(values: List[Any] = ()) -> frozenset:
    return frozenset(map(_key, values))


def _deque(values: Iterable[Any] = (), max_length: Optional[int] = None) -> deque:
    return deque(*_of((list, tuple), values), max_length)


def _dict(content: Mapping = {}) -> dict:
    return dict(*_of(dict, content))


def _counter(content: Mapping = {}) -> Counter:
    return Counter(*_of(dict, content))


def _ordered_dict() -> OrderedDict:
    return OrderedDict()


def _default_dict(factory: Optional[type] = None) -> defaultdict:
    if factory not in (None, *_BUILTINS.values()):
        raise Refused(f'a defaultdict of {printable(factory)}')
    return defaultdict(factory)


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


def _numpy_dtype(name: str, align: bool = False, copy: bool = True) -> np.dtype:
    """A dtype of its own, so that its state is not that of NumPy's."""
    # Numbers, booleans and text; no objects, records or dates.
    if not isinstance(name, str) or not re.fullmatch('[biufcSU][1-9][0-9]{0,8}', name):
        raise Refused('a NumPy array of something else than numbers or text')
    return np.dtype(name, copy=True)


def _numpy_array(kind: type, shape: Tuple, dtype: bytes) -> np.ndarray:
    """An array that its state will fill."""
    return np.empty(0)


def _numpy_from_buffer(
    data: bytes, dtype: np.dtype, shape: Tuple, order: str
) -> np.ndarray:
    _require_elements(data, dtype, shape)
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order=order)


def _numpy_scalar(dtype: np.dtype, data: bytes) -> np.generic:
    _require_elements(data, dtype, ())
    return np.frombuffer(data, dtype)[0]


def _require_elements(data: bytes, dtype: np.dtype, shape: Tuple) -> None:
    """Refuse data that are not the elements of an array."""
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, bytearray)):
        raise Refused('a NumPy array of objects')
    if not isinstance(shape, tuple) or not all(map(_is_length, shape)):
        raise ValueError('a NumPy array whose shape is none')
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f'a NumPy array that {len(data)} bytes do not fill')
    if dtype.kind == 'b' and data.strip(b'\0\1'):
        raise ValueError('booleans that are neither true nor false')


def _size(values: Iterable[int]) -> torch.Size:
    return torch.Size(_of(int, *values))


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
    if metadata or not re.fullmatch(r'torch\.(u?int|b?float)\d+\w*', str(dtype)):
        raise Refused(f'a tensor of {printable(str(dtype))}')
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
    if not all(map(_is_length, (offset, *size, *stride))) or len(size) != len(stride):
        raise ValueError('a tensor whose size, stride or offset is none')
    if storage.memory is None:
        return None
    available = storage.memory.numel() // dtype.itemsize
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # More elements than there are would be the same ones again: a number in a file
    # could fill any memory when it is copied.
    if elements > available or offset > available or (elements and last >= available):
        raise ValueError(f'a tensor beyond its storage of {available} elements')
    if math.prod(n or 1 for n in size) >= _MAX_LENGTH:
        raise ValueError('an empty tensor of too many elements')
    tensor = torch.empty((0,), dtype=dtype, device=storage.memory.device)
    tensor.set_(storage.memory.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _parameter(
    data: Optional[Tensor], requires_grad: bool, backward_hooks: Any
) -> Optional[nn.Parameter]:
    return None if data is None else nn.Parameter(data, requires_grad)


def _set_dict(target: dict, state: dict) -> None:
    """An argparse.Namespace has its values here, a yacs config its internals."""
    values = {key: value for key, value in state.items() if key[:2] != '__'}
    target.update(values)


def _set_ordered_dict(target: OrderedDict, state: dict) -> None:
    """PyTorch keeps the versions of modules beside their weights."""
    if '_metadata' in state:
        versions = state['_metadata']
        _of(dict, *_of(dict, versions)[0].values())
        _of((int, type(None)), *(v for of in versions.values() for v in of.values()))
        target._metadata = versions


def _set_history(target: HistoryBuffer, state: dict) -> None:
    values = {'max_length': state['max_length']}
    for name in ('_log_history', '_count_history'):
        values[name] = state[name]
        if not isinstance(values[name], np.ndarray) or values[name].ndim != 1:
            raise ValueError('a HistoryBuffer without a history')
    target.__setstate__(values)


def _set_numpy_dtype(target: np.dtype, state: Tuple) -> None:
    # (version, byte order, base and shape, names, fields, size, alignment, flags):
    # NumPy believes sizes and flags that are wrong, and then reads where it should not.
    if len(state) != 8 or state[2:5] != (None, None, None):
        raise Refused('a NumPy array of objects or records')
    if state[5:7] not in ((-1, -1), (target.itemsize, target.alignment)):
        raise ValueError('a NumPy dtype of another size')
    if state[7] != target.flags:
        raise ValueError('a NumPy dtype with other flags')
    target.__setstate__(state)


def _set_numpy_array(target: np.ndarray, state: Tuple) -> None:
    _, shape, dtype, _, data = state
    _require_elements(data, dtype, shape)
    target.__setstate__(state)


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

# OrderedDict before dict, of which it is one.
_RESTORE: Dict[type, Callable] = {
    OrderedDict: _set_ordered_dict,
    dict: _set_dict,
    HistoryBuffer: _set_history,
    np.dtype: _set_numpy_dtype,
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
_CALLS: Dict[Any, Callable] = {
    **_CLASSES,
    **{function: function for function in _FUNCTIONS.values()},
}
