# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import argparse
import collections
import copyreg
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from torch import nn

from mlla_mm.utils import checkpoint_file, compat
from mlla_mm.utils.checkpoint_file import (
    CheckpointError,
    fetch_checkpoint,
    load_checkpoint_file,
    read_checkpoint_meta,
    trust_checkpoints,
)

from .. import checkpoints

FORMATS = pytest.mark.parametrize('legacy', [False, True])
ATTACKS = sorted(checkpoints.attacks(Path('x')))
COLLECTIONS = (
    *(collections.Counter, collections.OrderedDict),
    *(collections.defaultdict, collections.deque),
)
DTYPES = 'float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64'


def save(content, path, legacy=False, protocol=2):
    torch.save(
        content,
        path,
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    return path


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        assert actual.requires_grad == expected.requires_grad
        assert torch.equal(actual, expected)
    elif isinstance(expected, (np.ndarray, np.generic)):
        # NumPy itself turns bytes to the machine's order.
        assert actual.dtype == expected.dtype.newbyteorder('=')
        assert actual.shape == expected.shape
        np.testing.assert_array_equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    else:
        assert actual == expected


@FORMATS
@pytest.mark.parametrize('protocol', [2, 4])
def test_what_checkpoints_hold(tmp_path, legacy, protocol):
    tensors = {d: torch.arange(6).to(getattr(torch, d)) for d in DTYPES.split()}
    base = torch.arange(12.0)
    content = dict(
        tensors=tensors,
        views=dict(part=base[2:5], turned=base.view(3, 4).t(), empty=base[:0]),
        parameter=nn.Parameter(torch.ones(2)),
        weights=nn.BatchNorm2d(3).state_dict(),
        arrays=dict(
            float=np.arange(6.0).reshape(2, 3),
            fortran=np.asfortranarray(np.arange(6).reshape(2, 3)),
            big_endian=np.arange(3, dtype='>i4'),
            half=np.ones(2, np.float16),
            text=np.array(['ab', 'c']),
            bytes=np.array([b'ab', b'c']),
            bool=np.array([True, False]),
            empty=np.zeros((0, 3)),
            no_axes=np.array(3),
        ),
        scalars=dict(a=np.float64(0.5), b=np.int64(3), c=np.bool_(True)),
        plain=[1, -1.5, 'text', b'\xff', None, True, 2**70, 3j, slice(1, 2)],
        containers=[(1,), {2}, frozenset([3]), bytearray(b'4'), b''],
        more=collections.defaultdict(list, a=[1]),
        order=collections.OrderedDict(b=1, a=2),
        count=collections.Counter('aab'),
        queue=collections.deque([1, 2]),
        types=[torch.float16, torch.Size([1, 2]), torch.device('cpu')],
    )
    path = save(content, tmp_path / 'x.pth', legacy, protocol)
    loaded = load_checkpoint_file(path)
    assert_same(loaded, content)
    assert loaded['weights']._metadata == content['weights']._metadata
    views = loaded['views']
    assert views['part'].data_ptr() == views['turned'].data_ptr() + 8


@pytest.mark.parametrize('protocol', [2, 4])
def test_history_of_a_run(tmp_path, protocol):
    hub = MessageHub('of a run')
    for value in (1.0, 2.0, 6.0):
        hub.update_scalar('loss', value)
    hub.update_info('iter', 3)
    path = save(hub.state_dict(), tmp_path / 'x.pth', protocol=protocol)
    loaded = MessageHub('loaded')
    loaded.load_state_dict(load_checkpoint_file(path))
    assert loaded.get_info('iter') == 3
    buffer = loaded.get_scalar('loss')
    assert (buffer.mean(), buffer.max(), buffer.current()) == (3, 6, 6)
    assert buffer.statistics('mean', 2) == 4
    buffer.update(11)
    assert buffer.mean() == 5


def test_numpy_of_either_version(tmp_path):
    """NumPy 2 moved the functions that its pickles name."""
    content = dict(array=np.arange(3), scalar=np.float32(2))
    written = pickle.dumps(content, 2)
    old, new = b'cnumpy.core.multiarray', b'cnumpy._core.multiarray'
    assert old in written or new in written
    for spelling in (old, new):
        other = written.replace(new, old).replace(old, spelling)
        checkpoints.save_pickle(other, tmp_path / 'x.pth', legacy=False)
        assert_same(load_checkpoint_file(tmp_path / 'x.pth'), content)


def test_configs_become_dicts(tmp_path):
    path = tmp_path / 'x.pth'
    checkpoints.save_official_training({'a': torch.ones(1)}, path)
    loaded = load_checkpoint_file(path)
    assert_same(loaded['config'], {'MODEL': {'TYPE': 'mlla', 'DEPTHS': [2, 4, 8, 4]}})
    assert loaded['max_accuracy'] == 83.5
    content = [argparse.Namespace(lr=0.1), ConfigDict(a=ConfigDict(b=1))]
    loaded = load_checkpoint_file(save(content, path))
    assert_same(loaded[0], {'lr': 0.1})
    assert_same(loaded[1], {'a': {'b': 1}})


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save({'a': 1}, tmp_path / 'x.pth')
    assert load_checkpoint_file('~/x.pth') == {'a': 1}


def test_fetching(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    path = save({'a': 1}, tmp_path / 'x.pth')
    fetched = fetch_checkpoint(path.as_uri())
    assert fetched == tmp_path / 'cache/hub/checkpoints/x.pth'
    assert fetched.read_bytes() == path.read_bytes()
    path.unlink()
    assert fetch_checkpoint(path.as_uri()) == fetched  # once
    address = (tmp_path / 'y.pth').as_uri()
    with pytest.raises(CheckpointError, match=f'{address} cannot be fetched'):
        fetch_checkpoint(address)


@pytest.mark.parametrize('rank', [0, 1])
def test_the_first_process_fetches_before_the_others(tmp_path, monkeypatch, rank):
    """The others wait before they look, and it waits for them afterwards."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    path = save({'a': 1}, tmp_path / 'x.pth')
    fetched = tmp_path / 'cache/hub/checkpoints/x.pth'
    waits = []

    def meet():
        waits.append(fetched.is_file())
        if rank == 1:
            fetched.parent.mkdir(parents=True)
            path.rename(fetched)  # it cannot be fetched any more

    monkeypatch.setattr(checkpoint_file, 'get_dist_info', lambda: (rank, 2))
    monkeypatch.setattr(checkpoint_file, 'barrier', meet)
    assert fetch_checkpoint(path.as_uri()) == fetched
    assert waits == [rank == 0]


def test_map_location(tmp_path):
    path = save({'a': torch.ones(2)}, tmp_path / 'x.pth')
    assert load_checkpoint_file(path, map_location='meta')['a'].is_meta
    assert load_checkpoint_file(str(path), map_location=None)['a'].device.type == 'cpu'


@FORMATS
@pytest.mark.parametrize('attack', ATTACKS)
def test_no_code_runs(tmp_path, attack, legacy):
    marker, path = tmp_path / 'ran', tmp_path / 'bad.pth'
    content = checkpoints.attacks(marker)[attack]
    checkpoints.save_pickle(content, path, legacy)
    with pytest.raises(CheckpointError, match='bad.pth is not loaded.*--trust-check'):
        load_checkpoint_file(path)
    assert not marker.exists()
    load_checkpoint_file(path, trust=True)
    assert marker.exists()


@FORMATS
def test_meta_without_tensors(tmp_path, legacy, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    meta = dict(epoch=3, iter=7, seed=np.int64(5), dataset_meta=dict(classes=('a',)))
    content = dict(
        meta=meta, state_dict=model.state_dict(), ema=list(model.parameters())
    )
    path = save(content, tmp_path / 'x.pth', legacy)
    if not legacy:
        monkeypatch.setattr(torch, 'load', None)
    assert_same(read_checkpoint_meta(path), meta)


@pytest.mark.parametrize('content', [dict(a=torch.ones(2)), dict(meta=1), [1]])
def test_no_meta(tmp_path, content):
    assert read_checkpoint_meta(save(content, tmp_path / 'x.pth')) == {}


@FORMATS
@pytest.mark.parametrize('attack', ATTACKS)
def test_no_code_runs_for_the_meta(tmp_path, attack, legacy):
    marker, path = tmp_path / 'ran', tmp_path / 'bad.pth'
    checkpoints.save_pickle(checkpoints.attacks(marker)[attack], path, legacy)
    with pytest.raises(CheckpointError, match='bad.pth is not loaded'):
        read_checkpoint_meta(path)
    assert not marker.exists()


def test_what_was_refused_is_named(tmp_path):
    path = save(checkpoints.Call(os.system, 'true'), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x.pth .*asks for (posix|nt)\.system,'):
        load_checkpoint_file(path)


def test_other_formats_run_no_code_either(tmp_path):
    path = tmp_path / 'x.pth'
    torch.jit.save(torch.jit.script(nn.ReLU()), path)
    with pytest.raises(CheckpointError, match='TorchScript'):
        load_checkpoint_file(path)
    # PyTorch's first format.
    content = checkpoints.attacks(tmp_path / 'ran')['exec']
    with tarfile.open(path, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(CheckpointError, match='tar archive'):
        load_checkpoint_file(path)
    path.write_bytes(content)  # a pickle in no format of PyTorch's
    with pytest.raises(CheckpointError, match=r'builtin.*\.exec'):
        load_checkpoint_file(path)
    assert not (tmp_path / 'ran').exists()


def raw(path, *opcodes):
    checkpoints.save_pickle(b'\x80\x02' + b''.join(opcodes) + b'.', path, legacy=False)
    return path


def value(content):
    return pickle.dumps(content, 2)[2:-1]


def test_classes_are_not_changed(tmp_path):
    """BUILD sets attributes of whatever it is given."""
    path, before = tmp_path / 'x.pth', HistoryBuffer.mean
    name = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
    raw(path, name, value((None, {'mean': 1})), b'b')
    with pytest.raises(CheckpointError, match='setting the state'):
        load_checkpoint_file(path)
    state = {'statistics_methods': {'mean': 1}, 'max_length': 9, 'mean': 1}
    state.update(_log_history=np.ones(1), _count_history=np.ones(1))
    raw(path, name, b')\x81', value(state), b'b')
    assert load_checkpoint_file(path).mean() == 1
    assert HistoryBuffer.mean is before
    assert HistoryBuffer._statistics_methods['mean'] is before
    raw(path, b'ctorch._utils\n_rebuild_tensor_v2\n', value({'a': 1}), b'b')
    with pytest.raises(CheckpointError, match='setting the state'):
        load_checkpoint_file(path)
    state = {'_metadata': {}, 'items': 1}
    raw(path, b'ccollections\nOrderedDict\n)R', value(state), b'b')
    assert vars(load_checkpoint_file(path)) == {'_metadata': {}}
    # NumPy's own dtype, in whose place a pickle may get it, stays as it is.
    raw(
        path, b'cnumpy\ndtype\n', value(('f8',)), b'R',
        value((3, '>', None, None, None, -1, -1, 0)), b'b',
    )  # fmt: skip
    assert load_checkpoint_file(path) == np.dtype('>f8')
    assert np.dtype('f8').isnative


def test_extensions_are_refused(tmp_path, monkeypatch):
    """What another package gave a number, and a pickle has used, is there by it."""
    monkeypatch.setitem(copyreg._extension_cache, 240, os.system)
    path = raw(
        tmp_path / 'x.pth', b'\x82\xf0', value((f'echo > {tmp_path}/ran',)), b'R'
    )
    with pytest.raises(CheckpointError, match='extension 240'):
        load_checkpoint_file(path)
    assert not (tmp_path / 'ran').exists()


def test_too_little_memory_is_not_blamed_on_the_file(tmp_path):
    """Here, for an array of bytes that no machine has room for."""
    path = raw(tmp_path / 'x.pth', b'\x96' + (1 << 62).to_bytes(8, 'little'))
    with pytest.raises(MemoryError):
        load_checkpoint_file(path)


DTYPE = b'cnumpy\ndtype\n'
ARRAY = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR'


@pytest.mark.parametrize(
    'opcodes',
    [
        [DTYPE, value(('O8',)), b'R'],
        [DTYPE, value(('f8,O',)), b'R'],
        [DTYPE, value(('f8,i4',)), b'R'],
        [DTYPE, value(('2f8',)), b'R'],
        # The last item is one too many.
        [
            *(DTYPE, value(('f8',)), b'R'),
            value((3, '<', *[None] * 3, -1, -1, 0, {})),
            b'b',
        ],
        # Records of objects that claim to have none.
        [
            *(DTYPE, value(('V8',)), b'R'),
            value((3, '|', None, ('a',), {'a': (None, 0)}, 8, 1, 0)),
            b'b',
        ],
        # A string longer than its memory.
        [DTYPE, value(('S5',)), b'R', value((3, '|', *[None] * 3, 4096, 1, 0)), b'b'],
        [DTYPE, value(('S5',)), b'R', value((3, '|', *[None] * 3, -5, 1, 0)), b'b'],
        [DTYPE, value(('f8',)), b'R', value((3, '<', *[None] * 3, -1, -1, 63)), b'b'],
        # Shapes that the data does not fill.
        [
            *(ARRAY, b'(K\x01', value((100,)), DTYPE, value(('f8',))),
            *(b'R\x89', value(b'12345678'), b'tb'),
        ],
        [
            *(ARRAY, b'(K\x01', value((-1, -1)), DTYPE, value(('f8',))),
            *(b'R\x89', value(b'12345678'), b'tb'),
        ],
        [ARRAY, value((1, (1,), 'O', False, [1])), b'b'],
        # Text in an encoding that is a program (PEP 263's are).
        [b'c_codecs\nencode\n', value(('a', 'punycode')), b'R'],
        [b'c__builtin__\ngetattr\n', value(('a', 'join')), b'R'],
        [b'c__builtin__\ngetattr\n', value(('a', 'min')), b'R'],
    ],
)  # fmt: skip
def test_arguments_that_lie(tmp_path, opcodes):
    with pytest.raises(CheckpointError):
        load_checkpoint_file(raw(tmp_path / 'x.pth', *opcodes))


@pytest.mark.parametrize(
    ('pytorch_checks', 'message'),
    [(compat.CHECKS_RECORD_LENGTHS, '16 bytes'), (False, 'record 0 has 16 bytes')],
)
def test_storages_that_are_shorter_than_said(
    tmp_path, monkeypatch, pytorch_checks, message
):
    """PyTorch before 2.11 does not look."""
    monkeypatch.setattr(compat, 'CHECKS_RECORD_LENGTHS', pytorch_checks)
    path, other = save({'a': torch.ones(4)}, tmp_path / 'x.pth'), tmp_path / 'y.pth'
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, 'w') as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith('/data.pkl'):
                assert content.count(b'K\x04') == 2
                content = content.replace(b'K\x04', b'M\xff\x7f')
            new.writestr(name, content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_file(other)
    assert_same(load_checkpoint_file(path), {'a': torch.ones(4)})


@FORMATS
def test_damaged_files(tmp_path, legacy):
    path = save({'a': torch.rand(1000)}, tmp_path / 'x.pth', legacy)
    whole = path.read_bytes()
    for length in (1, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match='x.pth is damaged'):
            load_checkpoint_file(path)
        with pytest.raises(CheckpointError, match='x.pth is damaged'):
            load_checkpoint_file(path, trust=True)


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'x.pth is empty'),
        (b'\n<!DOCTYPE html>\n<html>', 'x.pth is a web page'),
        (b'Link expired.', 'x.pth is damaged, or not a checkpoint'),
        (b'\x00' * 3000, 'x.pth is damaged, or not a checkpoint'),
    ],
)
def test_what_failed_downloads_leave(tmp_path, content, message):
    path = tmp_path / 'x.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_file(path)


def test_pytorchs_restrictions_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    path = save({'a': torch.rand(2)}, tmp_path / 'x.pth', legacy=False)
    for value in ('1', 'y', 'yes', 'True'):
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', value)
        with pytest.raises(CheckpointError, match=f'LOAD={value} is set.*Unset it'):
            load_checkpoint_file(path)
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    load_checkpoint_file(path)


def test_missing_file(tmp_path):
    for path in (tmp_path / 'x.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match='Checkpoint not found'):
            load_checkpoint_file(path)


def test_trust_is_for_the_process(tmp_path):
    marker = tmp_path / 'ran'
    path = tmp_path / 'x.pth'
    checkpoints.save_pickle(checkpoints.attacks(marker)['exec'], path, legacy=False)
    try:
        trust_checkpoints(True)
        with pytest.raises(CheckpointError):
            load_checkpoint_file(path, trust=False)
        assert not marker.exists()
        load_checkpoint_file(path)
        assert marker.exists()
    finally:
        trust_checkpoints(False)
    marker.unlink()
    with pytest.raises(CheckpointError):
        load_checkpoint_file(path)
    assert not marker.exists()


def test_only_data_is_permitted():
    """Whoever adds a name has to look at this list."""
    builtins = dict(
        bool=bool, bytearray=bytearray, bytes=bytes, complex=complex, dict=dict,
        float=float, frozenset=frozenset, int=int, list=list, set=set, slice=slice,
        str=str, tuple=tuple, getattr=checkpoint_file._statistics_method,
    )  # fmt: skip
    arrays = dict(
        _reconstruct=checkpoint_file._numpy_array, scalar=checkpoint_file._numpy_scalar
    )
    buffer = 'mmengine.logging.history_buffer.HistoryBuffer'
    expected = {
        **{f'builtins.{name}': value for name, value in builtins.items()},
        **{f'__builtin__.{name}': value for name, value in builtins.items()},
        **{f'collections.{kind.__name__}': kind for kind in COLLECTIONS},
        '_codecs.encode': checkpoint_file._encode,
        'torch.Size': torch.Size,
        'torch.device': torch.device,
        'torch.storage.UntypedStorage': torch.UntypedStorage,
        'torch._utils._rebuild_tensor': torch._utils._rebuild_tensor,
        'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
        'numpy.ndarray': None,
        'numpy.dtype': checkpoint_file._numpy_dtype,
        **{f'numpy.core.multiarray.{name}': value for name, value in arrays.items()},
        **{f'numpy._core.multiarray.{name}': value for name, value in arrays.items()},
        buffer: HistoryBuffer,
        **{f'{buffer}.{name}': None for name in ('min', 'max', 'current', 'mean')},
        'yacs.config.CfgNode': dict,
        'argparse.Namespace': dict,
        'mmcv.utils.config.ConfigDict': dict,
        'mmengine.config.config.ConfigDict': dict,
    }
    if hasattr(torch._utils, '_rebuild_tensor_v3'):
        v3 = torch._utils._rebuild_tensor_v3
        expected['torch._utils._rebuild_tensor_v3'] = v3
    found = {'.'.join(key): value for key, value in checkpoint_file._PERMITTED.items()}
    # PyTorch has more of them with every version.
    dtypes = {name for name, value in found.items() if isinstance(value, torch.dtype)}
    assert {f'torch.{name}' for name in DTYPES.split()} <= dtypes
    assert dtypes == {str(found[name]) for name in dtypes}
    assert {name: found[name] for name in found.keys() - dtypes} == expected
