# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Archives stand for the folders that they were made of."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from mmengine import fileio

from mlla_mm.datasets.archives import folder_files, write_archive, write_index
from mlla_mm.utils import archives
from mlla_mm.utils.archives import ArchiveError, file_size, is_file, is_folder
from mlla_mm.utils.files import NotRegularFileError, check_regular_file, file_problem

# Sorted as bytes, some of them stand between a folder and what is in it.
NAMES = [
    'a/b/1.jpg', 'a/2.jpg', 'a-b/3.jpg', 'a.b', 'a0/4.jpg', 'ab', 'é/ü.jpg', 'x.tar/5',
    f'{"long" * 50}/{"name" * 50}.jpg', 'empty',
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        path = tmp_path / 'data' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'' if name == 'empty' else os.urandom(1000 * i + 1))
    return tmp_path / 'data'


def pack(folder) -> Path:
    archive = folder.with_name(f'{folder.name}.tar')
    write_archive(folder, folder_files(folder), archive)
    assert write_index(archive) == len(folder_files(folder))
    return archive


def pack_with_tar(folder) -> Path:
    archive = folder.with_name('other.tar')
    subprocess.run(['tar', '-C', folder, '-cf', archive, '.'], check=True)
    write_index(archive)
    return archive


def listed(path, **options):
    return sorted(fileio.list_dir_or_file(path, **options))


@pytest.mark.parametrize('make', [pack, pack_with_tar])
def test_an_archive_is_read_as_a_folder(folder, make):
    archive = make(folder)
    for options in (
        dict(recursive=True),
        dict(list_dir=False),
        dict(list_file=False),
        dict(list_dir=False, suffix='.jpg', recursive=True),
    ):
        assert listed(archive, **options) == listed(folder, **options)
        assert listed(archive / 'a', **options) == listed(folder / 'a', **options)
    for name in NAMES:
        content = (folder / name).read_bytes()
        assert fileio.get(f'{archive}/{name}') == content
        assert file_size(archive / name) == len(content)
        assert is_file(archive / name) and not is_folder(archive / name)
        assert file_problem(archive / name) == file_problem(folder / name)
    for path in (archive, archive / 'a', archive / 'a/b', archive / 'a/b/../b'):
        assert is_folder(path) and not is_file(path) and fileio.exists(path)
        with pytest.raises(NotRegularFileError):
            check_regular_file(path)
    for path in (archive / 'b', archive / 'a/2.jpg/3', archive / 'a/2'):
        assert not is_folder(path) and not is_file(path) and not fileio.exists(path)
        with pytest.raises(FileNotFoundError, match=str(path)):
            fileio.get(path)
        with pytest.raises(FileNotFoundError):
            check_regular_file(path)


def test_text_in_an_archive(folder):
    (folder / 'list.txt').write_bytes('é 1\r\nü 2\n'.encode())
    archive = pack(folder)
    for root in (folder, archive):
        assert fileio.list_from_file(f'{root}/list.txt') == ['é 1', 'ü 2']


def test_hidden_files_and_links(folder):
    """What hides stays out. Links become what they lead to, hard ones too."""
    (folder / '.DS_Store').write_text('x')
    (folder / '.cache').mkdir()
    (folder / '.cache/1.jpg').write_text('x')
    (folder / 'link.jpg').symlink_to('a/2.jpg')
    os.link(folder / 'a/2.jpg', folder / 'hard.jpg')
    archive = pack(folder)
    assert listed(archive, list_dir=False, recursive=True) == sorted(
        [*NAMES, 'link.jpg', 'hard.jpg']
    )
    content = (folder / 'a/2.jpg').read_bytes()
    for name in ('a/2.jpg', 'link.jpg', 'hard.jpg'):
        assert fileio.get(archive / name) == content


def test_a_failure_leaves_no_archive(folder, tmp_path):
    os.mkfifo(folder / 'pipe')
    with pytest.raises(NotRegularFileError, match='pipe'):
        pack(folder)
    assert [path.name for path in tmp_path.iterdir()] == ['data']
    # What a killed run left behind is written anew.
    (folder / 'pipe').unlink()
    (tmp_path / '.data.tar.part').write_text('half')
    pack(folder)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'data', 'data.tar', 'data.tar.index'}


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match='no folder with files'):
        folder_files(tmp_path)


def compress(archive):
    subprocess.run(['gzip', '-n', archive], check=True)
    Path(f'{archive}.gz').rename(archive)


def cut_in_the_middle(archive):
    os.truncate(archive, archive.stat().st_size // 2)


def cut_behind_a_member(archive):
    """tar's readers take this for a whole archive."""
    content = archive.read_bytes().rstrip(b'\0')
    archive.write_bytes(content + bytes(-len(content) % 512))


@pytest.mark.parametrize(
    'spoil, words',
    [
        (compress, 'uncompressed'),
        (cut_in_the_middle, 'whole'),
        (cut_behind_a_member, 'cut off'),
        (lambda archive: archive.write_bytes(b''), 'whole'),
    ],
)
def test_no_index_for_half_an_archive(folder, spoil, words):
    archive = pack(folder)
    index = Path(f'{archive}.index')
    index.unlink()
    spoil(archive)
    with pytest.raises(ValueError, match=words):
        write_index(archive)
    assert not index.exists()


def test_links_in_the_archive_of_another_program(folder):
    (folder / 'link.jpg').symlink_to('a/2.jpg')
    with pytest.raises(ValueError, match='link.jpg.*--dereference'):
        pack_with_tar(folder)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda index: index.unlink(), 'has no index'),
        (lambda index: index.write_text('x'), 'is no index'),
        (lambda index: index.write_text(''), 'is no index'),
        (lambda index: os.truncate(index, 200), 'is no index'),
        (lambda index: shutil.copy(f'{index.parent}/other.index', index), 'bytes'),
    ],
)
def test_an_index_that_does_not_fit(folder, tmp_path, spoil, words):
    (tmp_path / 'small').mkdir()
    (tmp_path / 'small/1').write_text('x')
    shutil.copy(f'{pack(tmp_path / "small")}.index', tmp_path / 'other.index')
    archive = pack(folder)
    spoil(Path(f'{archive}.index'))
    for _ in range(2):
        with pytest.raises(ArchiveError, match=words) as caught:
            fileio.get(archive / 'ab')
        assert f'make_archive.py {archive}' in str(caught.value)
    assert 'cannot be opened' in file_problem(archive / 'ab')


def test_usual_paths_open_nothing(folder, monkeypatch):
    monkeypatch.setattr(archives, 'Archive', None)
    assert is_file(folder / 'x.tar/5')  # x.tar is a folder
    assert is_file(folder / 'ab') and not is_file(folder / 'no.tar/1')
