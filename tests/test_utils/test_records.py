# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What tools make of damaged files: tests/test_evaluation/test_comparison.py."""

import os

import pytest

from mlla_mm.utils.records import is_number, read_record, read_record_lines


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_a_record(tmp_path):
    path = write(tmp_path / 'a.json', b'{"a": [1, null], "b": "\xc3\xa9"}\n')
    assert read_record(path) == dict(a=[1, None], b='é')


@pytest.mark.parametrize('content', [b'{', b'{"a": 1', b'{"a": {}, "b', b' {"a": 1,\n'])
def test_a_record_without_its_end(tmp_path, content):
    path = write(tmp_path / 'a.json', content)
    assert read_record(path) is None
    path.write_bytes(b'{"b": 2}\n\n' + content)
    assert list(read_record_lines(path)) == [dict(b=2)]


@pytest.mark.parametrize(
    'content',
    [b'', b'[]', b'null', b'7', b'{"a": }', b'\xff', b'{"a": \xff', b'{"a":' * 10**5],
)
def test_no_record(tmp_path, content):
    path = write(tmp_path / 'a.json', content)
    with pytest.raises(ValueError, match='a.json holds no JSON object: '):
        read_record(path)
    if content:
        path.write_bytes(b'{}\n\n' + content)
        with pytest.raises(ValueError, match='holds no JSON object in line 3: '):
            list(read_record_lines(path))


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_what_is_no_file(tmp_path, make):
    make(tmp_path / 'a\n.json')
    for read in (read_record, lambda path: list(read_record_lines(path))):
        with pytest.raises(ValueError, match=r'a\\n.json is no file') as error:
            read(tmp_path / 'a\n.json')
        assert 'Move its folder out' in str(error.value)


def test_numbers():
    sound = [0, 1.5, -3, float('nan'), float('inf'), 2**62]
    assert all(map(is_number, sound))
    assert not any(
        map(is_number, [True, None, '1', [1], 10**101, -(10**400), 1e101, -1e308])
    )
