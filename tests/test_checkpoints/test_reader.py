# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import io
import os
import pickle
import random
import socket
import tarfile
import threading
import zipfile
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from mlla_mm.checkpoints import reader, unpickler
from mlla_mm.checkpoints.reader import (
    CheckpointError,
    fetch_checkpoint,
    load_checkpoint_file,
    load_pickle_file,
    read_checkpoint_meta,
    trust_checkpoints,
)

from .. import checkpoints

ATTACKS = sorted(checkpoints.attacks(Path('x')))
DTYPES = (
    'float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 '
    'complex128'
).split()
# Without a class of storages. PyTorch 2.1 has the last of them, and cannot save it.
if hasattr(torch, 'uint16'):
    DTYPES += ['uint16', 'uint64', 'float8_e4m3fn']


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'x.pth'


@pytest.fixture
def trusting():
    trust_checkpoints(True)
    yield
    trust_checkpoints(False)


def save(content, path, legacy=False, protocol=2):
    torch.save(
        content,
        path,
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    return path


def bytes_of(tensor):
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()
        assert actual.requires_grad == expected.requires_grad
        assert torch.equal(bytes_of(actual), bytes_of(expected))
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    else:
        assert actual == expected


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_what_checkpoints_hold(path, protocol):
    """What else they hold, tests/test_checkpoints/test_unpickler.py tries."""
    base = torch.arange(12.0)
    content = dict(
        tensors={name: torch.arange(6).to(getattr(torch, name)) for name in DTYPES},
        views=dict(part=base[2:5], turned=base.view(3, 4).t(), empty=base[:0]),
        no_axes=torch.tensor(3),
        parameter=nn.Parameter(torch.ones(2)),
        weights=nn.BatchNorm2d(3).state_dict(),
        scalar=np.float64(0.5),
        plain=[1, 'text', None, (1, {2})],
        order=OrderedDict(b=1, a=2),
    )
    loaded = load_checkpoint_file(save(content, path, protocol=protocol))
    assert_same(loaded, content)
    assert loaded['weights']._metadata == content['weights']._metadata
    views = loaded['views']
    assert views['part'].data_ptr() == views['turned'].data_ptr() + 8
    # They are no views of a tensor, which could not be trained.
    assert not views['part']._is_view()


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_history_of_a_run(path, protocol):
    hub = MessageHub('of a run')
    for value in (1.0, 2.0, 6.0):
        hub.update_scalar('loss', value)
    hub.update_info('iter', 3)
    save(hub.state_dict(), path, protocol=protocol)
    loaded = MessageHub('loaded')
    loaded.load_state_dict(load_checkpoint_file(path))
    assert loaded.get_info('iter') == 3
    buffer = loaded.get_scalar('loss')
    assert (buffer.mean(), buffer.max(), buffer.current()) == (3, 6, 6)
    assert buffer.statistics('mean', 2) == 4
    buffer.update(11)
    assert buffer.mean() == 5


def test_configs_become_dicts(path):
    checkpoints.save_official_training({'a': torch.ones(1)}, path)
    loaded = load_checkpoint_file(path)
    assert_same(loaded['config'], {'MODEL': {'TYPE': 'mlla', 'DEPTHS': [2, 4, 8, 4]}})
    assert loaded['max_accuracy'] == 83.5


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save({'a': 1}, tmp_path / 'x.pth')
    assert load_checkpoint_file('~/x.pth') == {'a': 1}


def test_map_location(path):
    save({'a': torch.ones(2), 'b': torch.zeros(1)}, path)
    for meta in ('meta', torch.device('meta')):
        assert load_checkpoint_file(path, map_location=meta)['a'].is_meta
    assert load_checkpoint_file(str(path), map_location=None)['a'].device.type == 'cpu'
    # As torch.load has it.
    places = []

    def place(storage, location):
        places.append((storage.nbytes(), location))
        return None if storage.nbytes() == 4 else storage

    assert_same(
        load_checkpoint_file(path, map_location=place),
        {'a': torch.ones(2), 'b': torch.zeros(1)},
    )
    assert places == [(8, 'cpu'), (4, 'cpu')]
    # Not the file's fault.
    with pytest.raises(RuntimeError, match='abacus'):
        load_checkpoint_file(path, map_location='abacus')


@pytest.mark.parametrize('attack', ATTACKS)
def test_no_code_runs(tmp_path, path, attack):
    marker = tmp_path / 'ran'
    checkpoints.save_pickle(checkpoints.attacks(marker)[attack], path)
    with pytest.raises(CheckpointError, match='x.pth is not loaded.*--trust-check'):
        load_checkpoint_file(path)
    with pytest.raises(CheckpointError, match='x.pth is not loaded'):
        read_checkpoint_meta(path)
    path.with_suffix('.pkl').write_bytes(checkpoints.attacks(marker)[attack])
    with pytest.raises(CheckpointError, match='x.pkl is not loaded'):
        load_pickle_file(path.with_suffix('.pkl'))
    assert not marker.exists()
    load_checkpoint_file(path, trust=True)
    assert marker.exists()


def test_meta_without_tensors(path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    meta = dict(epoch=3, iter=7, seed=np.int64(5), dataset_meta=dict(classes=('a',)))
    save(
        dict(meta=meta, state_dict=model.state_dict(), ema=list(model.parameters())),
        path,
    )
    # Tensors that are not there are not missed.
    checkpoints.rewrite(
        path, lambda name, old: None if name.startswith('data/') else old
    )
    assert_same(read_checkpoint_meta(path), meta)
    with pytest.raises(CheckpointError, match="x.pth is damaged.*'x/data/"):
        load_checkpoint_file(path)


def test_meta_of_a_trusted_file(path, trusting):
    content = dict(meta=dict(epoch=3), model=Path('no plain data'))
    for legacy in (False, True):
        assert read_checkpoint_meta(save(content, path, legacy)) == dict(epoch=3)


@pytest.mark.parametrize('content', [dict(a=torch.ones(2)), dict(meta=1), [1]])
def test_no_meta(path, content):
    assert read_checkpoint_meta(save(content, path)) == {}


def test_what_was_refused_is_named(path):
    save(checkpoints.Call(os.system, 'true'), path)
    with pytest.raises(CheckpointError, match=r'x.pth .*asks for (posix|nt)\.system\.'):
        load_checkpoint_file(path)
    checkpoints.save_pickle(
        checkpoints.whole(checkpoints.name('os\x1b[2J', 'system')), path
    )
    with pytest.raises(CheckpointError, match=r'asks for os\\x1b\[2J\.system') as error:
        load_checkpoint_file(path)
    assert str(error.value).isprintable()


def test_older_formats(tmp_path, path):
    """Nothing tells where their tensors end; they run no code either."""
    marker = tmp_path / 'ran'
    content = checkpoints.attacks(marker)['exec']
    checkpoints.save_pickle(content, path, legacy=True)
    first = tmp_path / 'first.pth'
    with tarfile.open(first, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for file in (path, first):
        for read in (load_checkpoint_file, read_checkpoint_meta):
            words = f'{file.name} is in .*Save it again.*--trust-checkpoint'
            with pytest.raises(CheckpointError, match=words):
                read(file)
    assert not marker.exists()
    save({'a': torch.ones(2)}, path, legacy=True)
    assert_same(load_checkpoint_file(path, trust=True), {'a': torch.ones(2)})


def test_other_formats_run_no_code_either(tmp_path, path):
    torch.jit.save(torch.jit.script(nn.ReLU()), path)
    with pytest.raises(CheckpointError, match='TorchScript'):
        load_checkpoint_file(path)
    # A pickle in no format of PyTorch's.
    path.write_bytes(checkpoints.attacks(tmp_path / 'ran')['exec'])
    with pytest.raises(CheckpointError, match='x.pth is damaged, or not a checkpoint'):
        load_checkpoint_file(path)
    assert not (tmp_path / 'ran').exists()


def test_compressed_records(path):
    save({'a': torch.zeros(10**6)}, path)
    checkpoints.rewrite(path, lambda name, old: old, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    # As SECURITY.md says.
    assert len(torch.load(path, weights_only=True)['a']) == 10**6
    for read in (load_checkpoint_file, read_checkpoint_meta):
        with pytest.raises(CheckpointError, match='compressed records.*--trust-check'):
            read(path)
    assert len(load_checkpoint_file(path, trust=True)['a']) == 10**6


def test_records_that_overlap(path):
    """A hundred names for the same megabyte."""
    save({'a': torch.zeros(250_000)}, path)
    with zipfile.ZipFile(path, 'a') as archive:
        for number in range(100):
            info = copy.copy(archive.getinfo('x/data/0'))
            info.filename = f'x/data/{number}'
            archive.filelist.append(info)
        archive._didModify = True
    with pytest.raises(CheckpointError, match='records that overlap'):
        load_checkpoint_file(path)


def test_records_that_are_longer_than_they_say(path):
    """Python before 3.11.8 reads all of the claimed bytes, for every record."""
    save({'a': torch.zeros(4), 'b': torch.zeros(250_000)}, path)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.getinfo('x/data/0').compress_size = 1_000_000
        archive._didModify = True
    with pytest.raises(CheckpointError, match='compressed records'):
        load_checkpoint_file(path)


def test_large_tensors_are_read_in_parts(path, monkeypatch):
    monkeypatch.setattr(unpickler, '_PART', 100)
    content = {'a': torch.arange(1000.0), 'b': torch.ones(25), 'c': torch.zeros(0)}
    assert_same(load_checkpoint_file(save(content, path)), content)
    whole = bytearray(path.read_bytes())
    whole[whole.index(content['a'].numpy().tobytes()) + 3999] ^= 1  # in the last part
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match='damaged.*CRC'):
        load_checkpoint_file(path)


def test_big_endian_numbers(path):
    save({'a': torch.ones(1)}, path)
    checkpoints.rewrite(path, lambda name, old: b'big' if name == 'byteorder' else old)
    with pytest.raises(CheckpointError, match='big-endian'):
        load_checkpoint_file(path)


@pytest.mark.parametrize(
    'change',
    [
        # A record of another length than the pickle says, both ways.
        lambda name, old: old[:-1] if name == 'data/0' else old,
        lambda name, old: old + bytes(4) if name == 'data/0' else old,
        lambda name, old: old.replace(b'K\x04', b'M\xff\x7f'),
        lambda name, old: old.replace(b'FloatStorage', b'DoubleStorage'),
        # Booleans that are neither.
        lambda name, old: old.replace(b'FloatStorage', b'BoolStorage').replace(
            b'K\x04', b'K\x10'
        ),
        # Missing: its memory would be whatever was there before.
        lambda name, old: None if name == 'data/0' else old,
        lambda name, old: None if name == 'data.pkl' else old,
        lambda name, old: old.replace(b'X\x01\x00\x00\x000', b'X\x01\x00\x00\x007'),
    ],
)
def test_records_that_lie(path, change):
    save({'a': torch.arange(1.0, 5)}, path)
    before = path.read_bytes()
    checkpoints.rewrite(path, change)
    assert path.read_bytes() != before
    with pytest.raises(CheckpointError, match='x.pth is damaged'):
        load_checkpoint_file(path)


def test_tensors_that_repeat_their_storage(path):
    """One number could be a million times in memory when it is copied.

    torch.load reads such a file, as SECURITY.md says.
    """
    save({'a': torch.ones(1).expand(10**6)}, path)
    assert len(torch.load(path, weights_only=True)['a']) == 10**6
    with pytest.raises(CheckpointError, match='more elements than its .*--trust'):
        load_checkpoint_file(path)


def test_one_storage_of_two_kinds(path):
    """PyTorch does not save it, and would read the second with the first's length."""
    base = torch.zeros(2)
    save({'a': base, 'b': torch.ones(2, dtype=torch.int32)}, path)
    checkpoints.rewrite(
        path,
        lambda name, old: old.replace(b'X\x01\x00\x00\x001', b'X\x01\x00\x00\x000'),
    )
    with pytest.raises(CheckpointError, match='damaged.*record 0'):
        load_checkpoint_file(path)


def test_a_changed_bit_is_noticed(path):
    content = {'a': torch.rand(1000)}
    whole = save(content, path).read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        changed = bytearray(whole)
        changed[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            loaded = load_checkpoint_file(path)
        except CheckpointError:
            continue
        assert_same(loaded, content)  # it was between the records


@pytest.mark.skipif(
    not hasattr(torch.serialization, 'set_crc32_options'), reason='PyTorch 2.6 has it'
)
def test_files_without_checksums(path):
    torch.serialization.set_crc32_options(False)
    try:
        save({'a': torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load_checkpoint_file(path), {'a': torch.ones(2)})


def test_damaged_files(path):
    whole = save({'a': torch.rand(1000)}, path).read_bytes()
    for length in (1, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for trust in (False, True):
            with pytest.raises(CheckpointError, match='x.pth is damaged'):
                load_checkpoint_file(path, trust=trust)
        with pytest.raises(CheckpointError, match='x.pth is damaged'):
            read_checkpoint_meta(path)


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'x.pth is empty'),
        (b'\n<!DOCTYPE html>\n<html>', 'x.pth is a web page'),
        (b'Link expired.', 'x.pth is damaged, or not a checkpoint'),
        (b'\x00' * 3000, 'x.pth is damaged, or not a checkpoint'),
        (b'PK\x05\x06' + bytes(18), 'x.pth is damaged'),  # an archive of nothing
    ],
)
def test_what_failed_downloads_leave(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_file(path)


def test_too_little_memory_is_not_blamed_on_the_file(path):
    save({'a': torch.ones(2)}, path)

    def no_room(storage, location):
        return bytearray(1 << 62)

    with pytest.raises(CheckpointError, match='x.pth needs more memory'):
        load_checkpoint_file(path, map_location=no_room)


@pytest.mark.parametrize(
    'read', [load_checkpoint_file, read_checkpoint_meta, load_pickle_file]
)
def test_what_is_no_file(tmp_path, read):
    """Some of these never end."""
    with pytest.raises(FileNotFoundError, match='Checkpoint not found: .*no.pth'):
        read(tmp_path / 'no.pth')
    pipe = tmp_path / 'pipe.pth'
    os.mkfifo(pipe)
    device = tmp_path / 'device.pth'
    device.symlink_to('/dev/zero')
    for path, kind in ((pipe, 'pipe'), (device, 'device'), (tmp_path, 'folder')):
        with pytest.raises(CheckpointError, match=f'{path.name} is .*{kind}'):
            read(path)


@pytest.mark.parametrize(
    'name', ['x' * 300, 'a\0b', '\x1b[31mx', '~nobody-of-this-name/x', '\ud800']
)
def test_names_of_no_file(tmp_path, name):
    path = name if name[0] == '~' else tmp_path / name
    for read in (load_checkpoint_file, read_checkpoint_meta, load_pickle_file):
        with pytest.raises((CheckpointError, FileNotFoundError)) as error:
            read(path)
        assert str(error.value).isprintable()


def test_messages_can_be_printed(tmp_path):
    for content in (b'', b'<', b'PK', b'PK\x03\x04', b'x', b'\x80\x02\x8a\nl'):
        path = tmp_path / '\x1b[31m\n.pth'
        path.write_bytes(content)
        for read in (load_checkpoint_file, read_checkpoint_meta, load_pickle_file):
            with pytest.raises(CheckpointError) as error:
                read(path)
            assert str(error.value).isprintable()


def test_pytorchs_restrictions(path, monkeypatch):
    """They are of torch.load, which reads trusted files alone."""
    save({'a': Path('no plain data')}, path)
    save({'b': 1}, path.with_name('y.pth'))
    for value in ('1', 'y', 'yes', 'True'):
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', value)
        with pytest.raises(CheckpointError, match=f'LOAD={value} is set.*Unset it'):
            load_checkpoint_file(path, trust=True)
        assert load_checkpoint_file(path.with_name('y.pth')) == {'b': 1}
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    load_checkpoint_file(path, trust=True)


def test_trust_is_for_the_process(tmp_path, path, trusting):
    marker = tmp_path / 'ran'
    checkpoints.save_pickle(checkpoints.attacks(marker)['exec'], path)
    with pytest.raises(CheckpointError):
        load_checkpoint_file(path, trust=False)
    assert not marker.exists()
    load_checkpoint_file(path)
    assert marker.exists()
    marker.unlink()
    trust_checkpoints(False)
    with pytest.raises(CheckpointError):
        load_checkpoint_file(path)
    assert not marker.exists()


def test_predictions(tmp_path):
    """Tensors, arrays and run-length encoded masks, as MMEngine dumps them."""
    base = torch.arange(6.0).view(2, 3)
    content = [
        dict(
            img_path='a.jpg', ori_shape=(4, 5), pred_label=torch.tensor([3]),
            boxes=base, turned=base.t(), scores=base[0].bfloat16(), scale=np.ones(2),
            masks=[dict(size=[4, 5], counts=b'\x05a')], empty=torch.zeros(0, 4),
        )
    ]  # fmt: skip
    path = tmp_path / 'predictions.pkl'
    for protocol in (2, 5):
        mmengine.dump(content, path, protocol=protocol)
        (loaded,) = load_pickle_file(path)
        np.testing.assert_array_equal(loaded.pop('scale'), content[0]['scale'])
        expected = {key: value for key, value in content[0].items() if key != 'scale'}
        assert_same(loaded, expected)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match='predictions.pkl is damaged'):
        load_pickle_file(path)
    # A checkpoint's storages are elsewhere.
    path.write_bytes(pickle.dumps(Path('x')))
    with pytest.raises(CheckpointError, match='pathlib.* Make the file again') as error:
        load_pickle_file(path)
    assert '--trust-checkpoint' not in str(error.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'hub' / 'checkpoints'


def test_fetching(tmp_path, path, cache):
    save({'a': 1}, path)
    fetched = fetch_checkpoint(path.as_uri())
    assert fetched.parents[1] == cache and fetched.name == 'x.pth'
    assert fetched.read_bytes() == path.read_bytes()
    path.unlink()
    assert fetch_checkpoint(path.as_uri()) == fetched  # once
    address = (tmp_path / 'y.pth').as_uri()
    with pytest.raises(CheckpointError, match=f'{address} cannot be fetched'):
        fetch_checkpoint(address)


def test_addresses_that_end_in_the_same_name(tmp_path, cache):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        path = save({'from': folder}, tmp_path / folder / 'epoch_12.pth')
        loaded = load_checkpoint_file(fetch_checkpoint(path.as_uri()))
        assert loaded == {'from': folder}


def test_names_that_tell_the_digest(tmp_path, path, cache):
    save({'a': 1}, path)
    other = path.with_name('mlla-0123abcd.pth')
    path.rename(other)
    with pytest.raises(CheckpointError, match='mlla-0123abcd.pth cannot .*[Hh]ash'):
        fetch_checkpoint(other.as_uri())
    assert not [file for file in cache.rglob('*') if file.is_file()]
    # A date, and words, tell none.
    for name in ('mlla-20240131.pth', 'mlla-ed.pth', 'mlla-default.pth'):
        other = other.rename(path.with_name(name))
        assert fetch_checkpoint(other.as_uri()).name == name


@pytest.fixture
def answer():
    """Serves one answer, whatever is asked; yields how."""
    with ExitStack() as stack:

        def serve(content: bytes) -> str:
            server = stack.enter_context(socket.create_server(('127.0.0.1', 0)))

            def reply():
                with server.accept()[0] as client:
                    client.recv(4096)
                    client.sendall(content)

            threading.Thread(target=reply, daemon=True).start()
            return f'http://127.0.0.1:{server.getsockname()[1]}'

        yield serve


@pytest.mark.parametrize(
    'content',
    [
        b'HTTP/1.1 404 \x1b[31mred\r\n\r\n',
        b'\x1b[31mgarbage\r\n\r\n',
        b'HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n',
        b'HTTP/1.1 302 Found\r\nLocation: http://[bad\r\n\r\n',
        b'HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n',
        b'',
    ],
)
def test_answers_that_are_none(cache, answer, content):
    with pytest.raises(CheckpointError, match='x.pth cannot be fetched') as error:
        fetch_checkpoint(f'{answer(content)}/x.pth')
    assert str(error.value).isprintable()
    assert not [path for path in cache.rglob('*') if path.is_file()]


@pytest.mark.parametrize(
    'url', ['http://[x/a.pth', 'http://\u2100/x', 'http://a\ud800/x.pth', 'http://']
)
def test_addresses_that_are_none(cache, url):
    with pytest.raises(CheckpointError, match='cannot be fetched') as error:
        fetch_checkpoint(url)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    'name', ['', '/', '/..', '/.', '/a/../../..', '/%2e%2e', '/a%2f']
)
def test_addresses_without_a_name(cache, answer, name):
    address = answer(b'HTTP/1.1 200 OK\r\n\r\nhello')
    path = fetch_checkpoint(f'{address}{name}')
    assert path.parents[1] == cache and path.read_bytes() == b'hello'


def test_one_process_that_fails_does_not_keep_the_others(path, cache, monkeypatch):
    meetings = []
    monkeypatch.setattr(reader, 'get_dist_info', lambda: (0, 2))
    monkeypatch.setattr(reader, 'barrier', lambda: meetings.append(1))
    with pytest.raises(CheckpointError, match='cannot be fetched'):
        fetch_checkpoint(path.as_uri())
    assert meetings == [1]


@pytest.mark.parametrize('rank', [0, 1])
def test_the_first_process_fetches_before_the_others(path, cache, monkeypatch, rank):
    """The others wait before they look, and it waits for them afterwards."""
    address = save({'a': 1}, path).as_uri()
    fetched = fetch_checkpoint(address)
    if rank == 0:
        fetched.unlink()
    else:
        fetched.rename(path)
    waits = []

    def meet():
        waits.append(fetched.is_file())
        if rank == 1:
            path.rename(fetched)  # it cannot be fetched any more

    monkeypatch.setattr(reader, 'get_dist_info', lambda: (rank, 2))
    monkeypatch.setattr(reader, 'barrier', meet)
    assert fetch_checkpoint(address) == fetched
    assert waits == [rank == 0]
