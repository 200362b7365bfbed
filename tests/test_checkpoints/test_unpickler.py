# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import argparse
import copy
import copyreg
import io
import itertools
import os
import pickle
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mlla_mm.checkpoints import unpickler
from mlla_mm.checkpoints.unpickler import (
    MAX_DEPTH,
    OLD_FORMAT,
    Refused,
    Storage,
    Unpickler,
    storage_from_bytes,
)

from ..checkpoints import call, name, value, whole

PROTOCOLS = pytest.mark.parametrize('protocol', [2, 3, 4, 5])
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64),
    *(torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.complex128),
)


def load(*opcodes, memory=b''):
    """Read a pickle whose tensors are of one storage with this memory."""
    data = torch.tensor(list(memory), dtype=torch.uint8)
    return Unpickler(
        whole(b''.join(opcodes)), lambda kind, key, length: Storage(data, kind.dtype)
    ).load()


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, (np.ndarray, np.generic)):
        # Protocols differ in whether NumPy turns bytes to the machine's order.
        assert actual.dtype.newbyteorder('=') == expected.dtype.newbyteorder('=')
        assert actual.shape == expected.shape
        np.testing.assert_array_equal(actual, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected):
            assert_same(*pair)
    else:
        assert actual == expected


PLAIN = [
    *(1, -1, 255, 256, 70000, -5, 2**31, 2**70, -(2**70), 1.5, float('inf'), 3j),
    *(None, True, False, 'text', 'ü\u2028', 'x' * 300, b'', b'\xff', b'y' * 300),
    *(bytearray(), bytearray(b'4'), bytearray(b'z' * 300), slice(1, None)),
    *([], [1], [1, [2]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    *(set(), {2, 3}, frozenset(), frozenset([3, 'a']), {}, {'a': 1, 2: {None: 'b'}}),
    *({('b', 'a'): 1, 1.5: 2}, OrderedDict(b=1, a=2), Counter('aab'), Counter()),
    *(torch.float16, torch.Size([1, 2]), torch.device('cpu'), torch.device('cuda', 1)),
    *(np.float64(0.5), np.int64(3), np.bool_(True), np.float32(2)),
    *(np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
    *(np.arange(3, dtype='>i4'), np.ones(2, np.float16), np.array(['ab', 'c'])),
    *(np.array([b'ab', b'c']), np.array([True, False]), np.zeros((0, 3)), np.array(3)),
]


@PROTOCOLS
def test_data(protocol):
    assert_same(Unpickler(pickle.dumps(PLAIN, protocol)).load(), PLAIN)
    # These become plain: Python crashes when they go, nested deeply enough.
    special = [defaultdict(int, a=[1]), defaultdict(None), deque([1, 2], 5), deque()]
    loaded = Unpickler(pickle.dumps(special, protocol)).load()
    assert_same(loaded, [{'a': [1]}, {}, [1, 2], []])
    assert Unpickler(pickle.dumps([int, str, set], protocol)).load() == [int, str, set]
    # What is the same object stays the same.
    shared = [1]
    loaded = Unpickler(pickle.dumps([shared, {'a': shared}], protocol)).load()
    assert loaded[0] is loaded[1]['a']


def test_pickles_in_a_row():
    stream = Unpickler(pickle.dumps(1) + pickle.dumps('a') + b'rest')
    assert (stream.load(), stream.load(), stream.read(4)) == (1, 'a', b'rest')
    with pytest.raises(EOFError):
        stream.read(1)


@PROTOCOLS
def test_configs_become_dicts(protocol):
    content = [argparse.Namespace(lr=0.1), ConfigDict(a=ConfigDict(b=1))]
    loaded = Unpickler(pickle.dumps(content, protocol)).load()
    assert_same(loaded, [{'lr': 0.1}, {'a': {'b': 1}}])


def test_numpy_of_either_version():
    """NumPy 2 moved the functions that its pickles name."""
    content = [np.arange(3), np.float32(2)]
    for protocol in (2, 5):
        written = pickle.dumps(content, protocol)
        old, new = b'numpy.core.', b'numpy._core.'
        assert old in written or new in written
        for spelling in (old, new) if protocol == 2 else ():
            other = written.replace(new, old).replace(old, spelling)
            assert_same(Unpickler(other).load(), content)


# What is on the stack, in ten places of the memo; value() uses the first ones.
KEEP = b''.join(b'q' + bytes([place]) for place in range(10))
KEPT = b'h\x09'
UNTYPED = name('torch.storage', 'UntypedStorage')
FLOATS = name('torch', 'FloatStorage')
# A pointer that C++ would follow.
ALLOCATOR = b'}' + value('allocator') + value(0x4141414141414141) + b's'
DEEP = b']' * 1000 + b'a' * 999
# x = (x, x), 60 times over.
SHARED = b'N' + b'q\x00h\x00\x86' * 60
DTYPE = name('numpy', 'dtype')
FLOAT64 = call(DTYPE, value('f8'), value(False), value(True))
ARRAY = call(
    name('numpy.core.multiarray', '_reconstruct'),
    *(name('numpy', 'ndarray'), value((0,)), value(b'b')),
)


def array_state(shape, dtype=FLOAT64, data=b'12345678'):
    parts = (value(1), value(shape), dtype, value(False), value(data))
    return b'(' + b''.join(parts) + b't'


REFUSED = {
    # Construction of classes of C++, by every opcode that calls.
    'storage by NEWOBJ_EX': UNTYPED + value((8,)) + ALLOCATOR + b'\x92',
    'storage by NEWOBJ': UNTYPED + value((8,)) + b'\x81',
    'storage by REDUCE': UNTYPED + value((8,)) + b'R',
    'storage by OBJ': b'(' + UNTYPED + value(8) + b'o',
    'storage by INST': b'(' + value(8) + b'itorch.storage\nUntypedStorage\n',
    'typed storage': FLOATS + value((8,)) + b'R',
    'dtype by NEWOBJ_EX': name('torch', 'float32') + b')}\x92',
    'class by OBJ': b'(' + name('builtins', 'set') + b'o',
    'call of an instance': value({'a': 1}) + b')R',
    'call of a nested tuple': SHARED + b')R',
    'a name of another class': name('torch', 'Tensor'),
    # Memory and time.
    'deep list': DEEP,
    'deep tuple': b')' + b'\x85' * 1000,
    'deep dict': (b'}' + value('a')) * 1000 + b'N' + b's' * 1000,
    'shared tuple': SHARED,
    'list of itself': b']q\x00h\x00a',
    'long list of itself': b'](' + b'N' * 10**5 + b'eq\x00h\x00a',
    'dict of itself': b'}' + KEEP + value('a') + KEPT + b's',
    'deep key': b'}' + b')' + b'\x85' * 1000 + b'Ns',
    'shared key': b'}' + SHARED + b'Ns',
    'shared item': b'\x8f(' + SHARED + b'\x90',
    'deep state': name('collections', 'OrderedDict')
    + b')R}' + value('_metadata') + DEEP + b'sb',
    'list as key': b'}]Ns',
    'bytearray of a length': call(name('builtins', 'bytearray'), value(10**15)),
    'integer of many digits': b'\x8b\x00\x10\x00\x00' + b'\x7f' * 0x1000,
    'copies of text': b'](' + value('x' * 200_000) + KEEP
    + call(name('_codecs', 'encode'), KEPT, value('latin1')) * 99 + b'e',
    'copies of a list': b'](](' + value(0) * 10_000 + b'e' + KEEP
    + call(name('builtins', 'set'), KEPT) * 99 + b'e',
    'copies of a state': b'](' + value(b'x' * 200_000) + KEEP
    + (ARRAY + b'(K\x01' + value((25_000,)) + FLOAT64 + b'\x89h\x09tb') * 99 + b'e',
    'slice of a list': call(name('builtins', 'slice'), DEEP, b'N', b'N'),
    'numbers of one hash': b'}' + value(2**61 - 1) + b'Ns',
    'number of a large hash': b'}' + value(2**60) + b'Ns',
    'float of a large hash': b'}' + value(2.0**61) + b'Ns',
    'NaN as key': b'}' + value(float('nan')) + b'Ns',
    'long text as key': b'}' + value('a' * 5000) + b'Ns',
    'text in a tuple as key': b'}' + value(('a' * 5000,)) + b'Ns',
    'tuple of numbers as key': b'}' + value((-1, -2)) + b'Ns',
    'long tuple as key': b'}' + value(('a',) * 9) + b'Ns',
    'set of an array': call(name('builtins', 'set'), ARRAY),
    'size of a tensor': call(name('torch', 'Size'), ARRAY),
    'dtype whose text is long': call(
        name('torch._utils', '_rebuild_tensor_v3'),
        *(b'N', b'N', b'N', b'N', b'N', b'N', SHARED),
    ),
    'modules of many versions': name('collections', 'OrderedDict')
    + b')R' + value({'_metadata': {'a': dict.fromkeys(range(9), 1)}}) + b'b',
    'versions that are none': name('collections', 'OrderedDict')
    + b')R}' + value('_metadata') + b'}(' + value('a') + DEEP + b'usb',
    'function by itself': b']' + name('_codecs', 'encode') + b'a',
    'storage alone': UNTYPED,
    'dtype by itself': b']' + call(DTYPE, value('f8')) + b'a',
    'storage by itself': b']' + UNTYPED + b'a',
    # What is changed.
    'items of a tensor': name('torch', 'float32') + b'(NNu',
    'items of an array': ARRAY + value(0) + b'Ns',
    'items of bytes': value(bytearray(b'a')) + value(0) + b'a',
    'state of a function': name('torch._utils', '_rebuild_tensor_v2')
    + value({'a': 1}) + b'b',
    'state of a class': name('mmengine.logging.history_buffer', 'HistoryBuffer')
    + value((None, {'mean': 1})) + b'b',
    # Names.
    'function by its dotted name': name('torch', '_utils._rebuild_tensor'),
    'text in an encoding that is a program': call(
        name('_codecs', 'encode'), value('a'), value('punycode')
    ),
    'getattr': call(name('builtins', 'getattr'), value('a'), value('join')),
    'getattr of text': call(name('builtins', 'getattr'), value('a'), value('min')),
    'name with control characters': name('os\x1b[31m', 'sys\ttem'),
    # NumPy.
    'objects': call(DTYPE, value('O8')),
    'records of objects': call(DTYPE, value('f8,O')),
    'records': call(DTYPE, value('f8,i4')),
    'arrays in arrays': call(DTYPE, value('2f8')),
    'elements of no size': call(DTYPE, value('U0')),
    'dates': call(DTYPE, value('M8')),
    'array of a list': ARRAY + array_state((1,), value('O'), [1]) + b'b',
    # Other protocols.
    'text protocol': b'I1\n',
    'protocol 1 before': b'\x80\x01N',
    'extension': b'\x82\xf0',
}  # fmt: skip


@pytest.mark.parametrize('kind', REFUSED)
def test_what_is_no_data(kind):
    with pytest.raises(Refused) as refused:
        load(REFUSED[kind])
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


# -1 as unsigned 8 bits: PyTorch compares it to 255, and to -1.
SIZE = call(
    name('torch._utils', '_rebuild_tensor_v2'),
    b'(' + value('storage') + name('torch', 'ByteStorage') + value('0') + value('cpu')
    + value(1) + b'tQ',
    *(value(0), value(()), value(()), value(False), value(None)),
)  # fmt: skip

DAMAGED = {
    'bytes of a length': call(name('builtins', 'bytes'), value(10**15)),
    'nothing': b'',
    'nothing on the stack': b'\x85',
    'no mark': b'Nt',
    'memo of another place': KEPT,
    'memo that skips numbers': b'Nr\xff\xff\x00\x00',
    'long number in text': b'L' + b'9' * 10**7 + b'L\n',
    'text behind the end': b'X\xff\xff\x00\x00',
    'bytes behind the end': b'\x8e' + (1 << 62).to_bytes(8, 'little'),
    'bytearray behind the end': b'\x96' + (1 << 62).to_bytes(8, 'little'),
    'no text': b'X\x01\x00\x00\x00\xff',
    'name without an end': b'cos',
    'dtype with an item too many': FLOAT64 + value((3, '<', *[None] * 3, -1, -1, 0, {}))
    + b'b',
    # NumPy believes sizes and flags.
    'text longer than its memory': call(DTYPE, value('S5'))
    + value((3, '|', *[None] * 3, 4096, 1, 0)) + b'b',
    'text of less than nothing': call(DTYPE, value('S5'))
    + value((3, '|', *[None] * 3, -5, 1, 0)) + b'b',
    'other flags': FLOAT64 + value((3, '<', *[None] * 3, -1, -1, 63)) + b'b',
    'records that claim to have no objects': FLOAT64
    + value((3, '|', None, ('a',), {'a': (None, 0)}, 8, 1, 0)) + b'b',
    'text beyond Unicode': ARRAY
    + array_state((1,), call(DTYPE, value('U1')), b'\xff' * 4) + b'b',
    # Arrays that the data do not fill.
    'too long an array': ARRAY + array_state((100,)) + b'b',
    'a length below zero': ARRAY + array_state((-1, -1)) + b'b',
    'a length that overflows': ARRAY + array_state((2**32, 2**32)) + b'b',
    'a length that is none': ARRAY + array_state((1.0,)) + b'b',
    'two and a half elements': ARRAY + array_state((2,), data=b'x' * 20) + b'b',
    'a scalar of fewer bytes': call(
        name('numpy.core.multiarray', 'scalar'), FLOAT64, value(b'1234')
    ),
    'a buffer of fewer bytes': call(
        name('numpy.core.numeric', '_frombuffer'),
        *(value(b'1234'), FLOAT64, value((1,)), value('C')),
    ),
    'booleans that are neither': ARRAY
    + array_state((1,), call(DTYPE, value('b1')), b'\x02') + b'b',
    'text of another size, by the default': call(DTYPE, value('S5'))
    + value((3, '|', *[None] * 3, -1, -1, 0)) + b'b',
    'size that compares to any': FLOAT64
    + b'(' + value(3) + value('<') + b'NNN' + SIZE + SIZE + value(0) + b'tb',
    'a byte order that is none': FLOAT64 + value((3, '\x1b', *[None] * 3, -1, -1, 0))
    + b'b',
    'an array of many axes': ARRAY + array_state((1,) * 65) + b'b',
    'history of any length': name('mmengine.logging.history_buffer', 'HistoryBuffer')
    + b')\x81'
    + value(dict(max_length=[9], _log_history=np.ones(1), _count_history=np.ones(1)))
    + b'b',
    'histories of two lengths': name('mmengine.logging.history_buffer', 'HistoryBuffer')
    + b')\x81'
    + value(dict(max_length=9, _log_history=np.ones(2), _count_history=np.ones(1)))
    + b'b',
    'history of words': name('mmengine.logging.history_buffer', 'HistoryBuffer')
    + b')\x81'
    + value(dict(max_length=9, _log_history=np.array(['a']), _count_history=np.ones(1)))
    + b'b',
    'history of text': name('mmengine.logging.history_buffer', 'HistoryBuffer')
    + b')\x81'
    + value(dict(max_length=9, _log_history='a', _count_history='b')) + b'b',
}  # fmt: skip


@pytest.mark.parametrize('kind', DAMAGED)
def test_damage(kind):
    # What is refused may be damaged as well.
    with pytest.raises(Exception):  # noqa: B017
        load(DAMAGED[kind], memory=b'\xff')


def test_depth_that_is_allowed():
    for depth, refused in ((MAX_DEPTH, False), (MAX_DEPTH + 1, True)):
        opcodes = b']' * (depth + 1) + b'a' * depth  # the innermost holds nothing
        if refused:
            with pytest.raises(Refused, match=f'{MAX_DEPTH} deep'):
                load(opcodes)
        else:
            assert str(load(opcodes)).count('[') == depth + 1


def test_number_of_objects(monkeypatch):
    monkeypatch.setattr(unpickler, 'MAX_STEPS', 1000)
    # A large file may have many, and sets take more memory.
    assert load(b'](' + b'K\x01' * 900 + b'e') == [1] * 900
    assert load(b'](' + b'\x8f' * 90 + b'e') == [set()] * 90
    with pytest.raises(Refused, match='1,000 steps'):
        load(b'](' + b'\x8f' * 100 + b'e')
    # Ten times one list of 200.
    shared = b'](' + b'N' * 200 + b'eq\x00' + b'h\x00' * 9
    with pytest.raises(Refused, match='1,000 objects, written out'):
        load(b'(' + shared + b't')


def orbit(length):
    """Numbers that meet in a dict: the places that one of them tries, one by one."""
    size, place, places = 4 * length, 0, []
    while len(places) < length:
        places.append(place)
        place = (5 * place + 1) % size
    return places


@pytest.mark.parametrize('kind', ['dict', 'set'])
def test_keys_that_meet_cost_more(kind):
    """Each of them may look at all those before it."""
    numbers = [b'J' + number.to_bytes(4, 'little') for number in orbit(2**15)]
    if kind == 'dict':
        content = b'}(' + b''.join(number + b'N' for number in numbers) + b'u'
    else:
        content = b'\x8f(' + b''.join(numbers) + b'\x90'
    assert len(load(content)) == 2**15
    with pytest.raises(Refused, match='steps'):
        load(b'(' + content * 3 + b't')


@pytest.mark.parametrize('kind', ['set', 'dict', 'Counter', 'OrderedDict'])
def test_copies_of_containers_cost_more(kind):
    """An item of a dict takes fifty times the memory of a byte of the file."""
    texts = [value(f'{i:04}')[:-2] for i in range(5000)]  # without memo
    if kind == 'OrderedDict':
        versions = b'}(' + b''.join(text + b'}' for text in texts) + b'u'
        content = b'}' + value('_metadata') + versions + b's'
        copy = name('collections', kind) + b')R' + KEPT + b'b'
    elif kind == 'set':
        content = b'](' + b''.join(texts) + b'e'
        copy = call(name('builtins', kind), KEPT)
    else:
        content = b'}(' + b''.join(text + b'N' for text in texts) + b'u'
        called = {'dict': ('yacs.config', 'CfgNode'), 'Counter': ('collections', kind)}
        copy = call(name(*called[kind]), KEPT)
    assert len(load(b'(' + content + KEEP + copy + b't')) == 2
    with pytest.raises(Refused, match='steps'):
        load(b'(' + content + KEEP + copy * 200 + b't')


def test_nothing_that_exists_is_changed():
    before = HistoryBuffer.mean
    state = dict(statistics_methods={'mean': 1}, max_length=9, mean=1)
    state.update(_log_history=np.ones(1), _count_history=np.ones(1))
    history = name('mmengine.logging.history_buffer', 'HistoryBuffer')
    assert load(history, b')\x81', value(state), b'b').mean() == 1
    assert HistoryBuffer.mean is before
    assert HistoryBuffer._statistics_methods['mean'] is before
    state = value({'_metadata': {}, 'items': 1})
    loaded = load(name('collections', 'OrderedDict'), b')R', state, b'b')
    assert vars(loaded) == {'_metadata': {}}
    # Neither NumPy's own dtype, nor that of an array that uses it.
    one = np.float64(1).tobytes()
    little, big = (value((3, x, None, None, None, -1, -1, 0)) + b'b' for x in '<>')
    first, second = load(
        b'(' + ARRAY + array_state((1,), FLOAT64 + KEEP + little, one) + b'b',
        ARRAY + array_state((1,), KEPT + big, one[::-1]) + b'bt',
    )
    assert first == second == 1
    assert np.dtype('f8').isnative


def test_extensions(monkeypatch):
    """What another package gave a number, and a pickle has used, is there by it."""
    monkeypatch.setitem(copyreg._extension_cache, 240, os.system)
    with pytest.raises(Refused, match='EXT1'):
        load(b'\x82\xf0' + value(('true',)) + b'R')


def reference(kind='Float', length=4):
    parts = (value('storage'), name('torch', f'{kind}Storage'), value('0'))
    return b'(' + b''.join(parts) + value('cpu') + value(length) + b'tQ'


def tensor(offset, size, stride, *more, storage=None, version=2):
    return call(
        name('torch._utils', f'_rebuild_tensor_v{version}'),
        *(storage or reference(), value(offset), value(size), value(stride)),
        *(value(False), value(None), *more),
    )


def test_tensors_lie_within_their_storage():
    """Against a list of all elements, for what fits and what does not."""
    memory = np.arange(4, dtype=np.float32)
    fits = 0
    for offset, *shape in itertools.product(
        range(6), range(4), range(3), *[range(5)] * 2
    ):
        size, stride = tuple(shape[:2]), tuple(shape[2:])
        elements = [
            offset + row * stride[0] + column * stride[1]
            for row, column in itertools.product(*map(range, size))
        ]
        opcodes = tensor(offset, size, stride)
        if offset > 4 or len(elements) > 4 or max(elements, default=0) > 3:
            with pytest.raises((ValueError, Refused), match='its storage'):
                load(opcodes, memory=memory.tobytes())
        else:
            loaded = load(opcodes, memory=memory.tobytes())
            assert (loaded.shape, loaded.stride()) == (size, stride)
            assert loaded.flatten().tolist() == [memory[i] for i in elements]
            fits += 1
    assert fits > 100


@pytest.mark.parametrize(
    'offset, size, stride',
    [
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), ()),
        (0, (), (1,)),
        (True, (1,), (1,)),
        ('0', (1,), (1,)),
        (0.0, (1,), (1,)),
        (2**63, (1,), (1,)),
        (0, (2**63,), (1,)),
        (0, (2,), (2**62,)),
        # Products of 64 bits overflow.
        (0, (2**32, 2**32), (1, 1)),
        (0, (2**47, 2**47, 0), (1, 1, 1)),
        (0, None, (1,)),
        (0, [1], [1]),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_sizes_that_are_none(offset, size, stride):
    with pytest.raises((ValueError, Refused)):
        load(tensor(offset, size, stride), memory=bytes(16))


@pytest.mark.parametrize('size', [(0, 2**40), (2**20, 0), (2**21, 0), (9, 2**40, 0)])
def test_empty_tensors_and_arrays(size):
    """Their memory is nothing, but as a list they have an item for each row."""
    many = size[0] != 0 and size != (2**20, 0)
    array = ARRAY + array_state(size, data=b'') + b'b'
    for opcodes in (tensor(0, size, (1,) * len(size)), array):
        if many:
            with pytest.raises(Refused, match='many rows'):
                load(opcodes)
        else:
            assert load(opcodes).shape == size


def test_dtypes_count_in_their_own_bytes():
    def as_dtype(dtype, size):
        more = (name('torch', dtype),)
        bytes_of = reference('Byte', 16)
        return tensor(0, (size,), (1,), *more, storage=bytes_of, version=3)

    memory = np.arange(4, dtype=np.float32).tobytes()
    assert load(as_dtype('float32', 4), memory=memory).tolist() == [0, 1, 2, 3]
    assert load(as_dtype('int16', 8), memory=memory).dtype == torch.int16
    for dtype, size in (('float64', 3), ('float32', 5), ('int16', 9)):
        with pytest.raises((ValueError, Refused), match='its storage'):
            load(as_dtype(dtype, size), memory=memory)
    for dtype in ('bool', 'quint8', 'complex64'):
        with pytest.raises(Refused, match=f'torch.{dtype}'):
            load(as_dtype(dtype, 1), memory=memory)


def test_views_with_metadata():
    with pytest.raises(Refused, match='conjugates'):
        load(tensor(0, (1,), (1,), value({'conj': True})), memory=bytes(16))


def test_only_the_storage_says_what_a_tensor_is():
    """Bytes would become booleans that are neither 0 nor 1."""
    more = (value(None), name('torch', 'bool'))
    with pytest.raises(TypeError, match='positional arguments'):
        load(
            tensor(0, (4,), (1,), *more, storage=reference('Byte')), memory=b'\1\2\3\4'
        )


def test_references_are_short_tuples():
    """Each one is taken apart: a tensor into millions, a long tuple again and again."""
    long = reference('Byte')[:-2] + b'N' * 99 + b'tQ'
    for wrong in (tensor(0, (4,), (1,)) + b'Q', long):
        with pytest.raises(Refused, match='as argument|too long a reference'):
            load(wrong, memory=bytes(16))


def test_tensors_need_a_storage():
    for storage in (value(None), value((b'1234', 4)), FLOATS):
        with pytest.raises(Refused, match='as argument'):
            load(tensor(0, (1,), (1,), storage=storage))
    with pytest.raises(Refused, match='a storage'):
        Unpickler(whole(tensor(0, (1,), (1,)))).load()


@pytest.mark.parametrize('dtype', DTYPES)
def test_tensors_in_plain_pickles(dtype):
    names = {('torch.storage', '_load_from_bytes'): storage_from_bytes}
    base = torch.arange(6).to(dtype)
    for content in (base, base.view(2, 3).t(), base[:0], base[1:3]):
        loaded = Unpickler(pickle.dumps(content), names=names).load()
        assert (loaded.dtype, loaded.stride()) == (content.dtype, content.stride())
        assert torch.equal(loaded, content)
    with pytest.raises(Refused, match='_load_from_bytes'):
        Unpickler(pickle.dumps(base)).load()


def saved_storage(content):
    buffer = io.BytesIO()
    storage = content.untyped_storage()
    torch.save(storage, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_storages_that_lie():
    whole_storage = saved_storage(torch.tensor([1, 0, 1], dtype=torch.uint8))
    assert storage_from_bytes(whole_storage).memory.tolist() == [1, 0, 1]
    length = (3).to_bytes(8, 'little')
    assert whole_storage.endswith(length + b'\1\0\1')
    for wrong in (
        whole_storage[:-1],
        whole_storage.replace(length, (2).to_bytes(8, 'little')),
        whole_storage.replace(length, (-1).to_bytes(8, 'little', signed=True)),
        whole_storage.replace(b'K\3', b'K\4'),
        whole_storage.replace(b'UntypedStorage', b'BoolStorage').replace(
            b'\0\1', b'\2\3'
        ),
    ):
        assert wrong != whole_storage
        with pytest.raises((ValueError, EOFError, Refused)):
            storage_from_bytes(wrong)
    buffer = io.BytesIO()
    torch.save([1], buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(Refused, match='else than a storage'):
        storage_from_bytes(buffer.getvalue())


@PROTOCOLS
def test_data_stay_far_below_the_budget(protocol):
    """A large file of the smallest parts that predictions and checkpoints have."""
    names = {('torch.storage', '_load_from_bytes'): storage_from_bytes}
    for part in (torch.tensor(1), np.ones(9), np.float64(1), dict(a=(1,), b={2})):
        content = pickle.dumps([copy.copy(part) for _ in range(200)], protocol)
        Unpickler(content, names=names, max_steps=5 * len(content) // 2).load()


def test_storages_take_few_steps():
    """Pickles in a pickle would multiply its bounds."""
    long = OLD_FORMAT + pickle.dumps(list(range(2000)))
    with pytest.raises(Refused, match='1,000 steps'):
        storage_from_bytes(long)


def test_states_replace_values():
    """Counter's own update adds them, and tensors grow by being added."""
    counter = call(name('collections', 'Counter'), value({'a': 1}))
    assert load(counter, value({'a': 5, '__b': 1}), b'b') == Counter(a=5)


def test_deep_structures_are_freed(tmp_path):
    """Also what a pickle leaves behind. Python crashes where types do not help it."""
    depth = 100_000
    key = KEEP + value('a') + b'q\x0a'
    deque_ = name('collections', 'deque') + KEEP + (KEPT + b')R') * depth
    defaultdict_ = name('collections', 'defaultdict')
    deep = {
        'list': b']' * depth + b'a' * (depth - 1),
        'tuple': b')' + b'\x85' * depth,
        'dict': b'}' + key + b'}h\x0a' * depth + b'N' + b's' * (depth + 1),
        'deque': deque_ + b'N' + b'a' * depth,
        'defaultdict': defaultdict_
        + key
        + (KEPT + b')Rh\x0a') * depth
        + b'N'
        + b's' * depth,
        'left': deque_ + b'N' + b'a' * depth + b'}',
    }
    for kind, opcodes in deep.items():
        (tmp_path / kind).write_bytes(whole(opcodes))
    code = (
        'import sys\n'
        'from mlla_mm.checkpoints.unpickler import Refused, Unpickler\n'
        'for path in sys.argv[1:]:\n'
        '    try:\n'
        '        print(Unpickler(open(path, "rb").read()).load(), flush=True)\n'
        '    except Refused as error:\n'
        '        print(error, flush=True)\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', code, *(tmp_path / kind for kind in deep)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-500:]
    *refused, left = result.stdout.splitlines()
    assert len(refused) == 5 and all('100 deep' in line for line in refused)
    assert left == '{}'


def test_bytes_that_are_no_booleans():
    def read(content, dtype, count=2):
        return bytes(unpickler.read_memory(io.BytesIO(content), count, dtype).numpy())

    assert read(b'\0\2', torch.uint8) == b'\0\2'
    assert read(b'\0\1', torch.bool) == b'\0\1'
    with pytest.raises(ValueError, match='booleans'):
        read(b'\0\2', torch.bool)
    with pytest.raises(EOFError, match='too early'):
        read(b'\0\1', torch.bool, 3)


def test_random_damage():
    """Whatever is changed, the reader ends, with data or an error."""
    generator = random.Random(0)
    content = [PLAIN, dict(a=np.arange(5), b=OrderedDict(c=(1, 2.5)))]
    errors = 0
    for protocol in (2, 4):
        whole_pickle = pickle.dumps(content, protocol) + b'.'
        for _ in range(2000):
            changed = bytearray(whole_pickle)
            for _ in range(generator.choice([1, 2, 10])):
                changed[generator.randrange(len(changed))] = generator.randrange(256)
            try:
                Unpickler(bytes(changed)).load()
            except Exception:  # noqa: BLE001
                errors += 1
    assert errors > 1000


def test_the_names():
    """Whoever adds one has to look at this list."""
    builtins = (
        'bool bytearray bytes complex dict float frozenset getattr int list set slice '
        'str tuple'
    ).split()
    arrays = ('multiarray._reconstruct', 'multiarray.scalar', 'numeric._frombuffer')
    buffer = 'mmengine.logging.history_buffer.HistoryBuffer'
    rebuild = '_tensor _tensor_v2 _tensor_v3 _parameter'.split()
    storages = (
        'BFloat16 Bool Byte Char ComplexDouble ComplexFloat Double Float Half Int Long '
        'Short'
    ).split()
    expected = {
        *(f'builtins.{name}' for name in builtins),
        *(f'__builtin__.{name}' for name in builtins),
        *(f'collections.{name}' for name in ('Counter', 'OrderedDict')),
        *(f'collections.{name}' for name in ('defaultdict', 'deque')),
        *('__builtin__.long', '__builtin__.unicode'),
        *('_codecs.encode', 'torch.Size', 'torch.device', 'numpy.ndarray'),
        *('numpy.dtype', 'torch.storage.UntypedStorage'),
        *(f'torch.{name}Storage' for name in storages),
        *(f'torch._utils._rebuild{name}' for name in rebuild),
        *(f'numpy.core.{name}' for name in arrays),
        *(f'numpy._core.{name}' for name in arrays),
        *(buffer, *(f'{buffer}.{name}' for name in ('min', 'max', 'current', 'mean'))),
        *('yacs.config.CfgNode', 'argparse.Namespace', 'mmcv.utils.config.ConfigDict'),
        'mmengine.config.config.ConfigDict',
    }
    found = {'.'.join(key): value for key, value in unpickler._NAMES.items()}
    # PyTorch has more of them with every version.
    dtypes = {name for name, value in found.items() if isinstance(value, torch.dtype)}
    assert {str(dtype) for dtype in DTYPES} <= dtypes
    assert dtypes == {str(found[name]) for name in dtypes}
    assert found.keys() - dtypes == expected
    for kind in found.values():
        assert not callable(kind) or isinstance(kind, type) or kind in OURS
    # What is called for a class is ours, or the class itself with checked arguments.
    for kind, (make, _) in unpickler._CLASSES.items():
        assert make is kind or make.__module__ == unpickler.__name__


OURS = {
    function
    for function in vars(unpickler).values()
    if getattr(function, '__module__', '') == unpickler.__name__
}
