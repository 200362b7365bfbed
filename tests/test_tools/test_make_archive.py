# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import tarfile

import pytest
from mmengine import fileio

TOOL = 'tools/dataset_tools/make_archive.py'


@pytest.fixture
def folders(tmp_path):
    for name in ('train', 'val'):
        (tmp_path / name / 'a').mkdir(parents=True)
        (tmp_path / name / 'a' / '1.jpg').write_text(name)
    return tmp_path


def test_folders(call_tool, folders):
    output = call_tool(TOOL, folders / 'train', folders / 'val').stdout
    for name in ('train', 'val'):
        assert f'{folders / name}.tar: 1 files' in output
        assert fileio.get(f'{folders / name}.tar/a/1.jpg').decode() == name
    # A repeated command leaves what is complete.
    before = (folders / 'train.tar').stat().st_mtime_ns
    assert 'already there' in call_tool(TOOL, folders / 'train').stdout
    assert (folders / 'train.tar').stat().st_mtime_ns == before


def test_another_folder_for_archives(call_tool, folders):
    call_tool(TOOL, folders / 'val', '--out', folders / 'out')
    names = {path.name for path in (folders / 'out').iterdir()}
    assert names == {'val.tar', 'val.tar.index'}


@pytest.mark.parametrize('index', [None, 'of another archive'])
def test_an_archive_that_is_there(call_tool, folders, index):
    with tarfile.open(folders / 'own.tar', 'w') as tar:
        tar.add(folders / 'train', arcname='.')
    if index:
        (folders / 'own.tar.index').write_text(index)
    call_tool(TOOL, folders / 'own.tar')
    assert fileio.get(folders / 'own.tar/a/1.jpg') == b'train'


@pytest.mark.parametrize('name', ['no', 'no.tar'])
def test_errors(call_tool, tmp_path, name):
    result = call_tool(TOOL, tmp_path / name, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ') and name in result.stderr
