# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest

from mlla_mm.utils.files import file_problem, part_of, write_whole

from ..bad_data import assert_says


def test_links_are_replaced(tmp_path):
    """Neither the file nor its part is written through one."""
    outside, path = tmp_path / 'outside', tmp_path / 'folder' / 'report.md'
    outside.write_text('mine')
    path.parent.mkdir()
    for link in (path, part_of(path)):
        link.symlink_to(outside)
        write_whole(path, b'new')
        assert path.read_bytes() == b'new' and not path.is_symlink()
        assert not part_of(path).is_symlink()
    assert outside.read_text() == 'mine'


def test_long_names(tmp_path):
    path = tmp_path / ('ü' * 127)
    write_whole(path, b'new')
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_what_was_there_stays(tmp_path):
    path = tmp_path / 'report.md'
    write_whole(path, b'old')
    part_of(path).mkdir()
    with pytest.raises(OSError):
        write_whole(path, b'new')
    assert path.read_bytes() == b'old'


@pytest.mark.parametrize(
    'name', ['none.jpg', 'a\x00b.jpg', 'n' * 300, 'loop', '\ud800.jpg', 'none\x1b[31m']
)
def test_names_of_no_file(tmp_path, name):
    if name == 'loop':
        (tmp_path / name).symlink_to(name)
    problem = file_problem(tmp_path / name)
    assert_says(problem, 'cannot be opened (')
    assert problem.isprintable()
