# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
from pathlib import Path

import pytest

from mlla_mm.compat.imports import find_import_failures, one_line

MODULES = {
    'good': 'print("noise")',
    'first': 'import sys; sys.modules["was_first"] = sys',
    'needs_first': 'import was_first',
    'lacks': 'import not_there.inside',
    'lacks_it_too': 'import lacks',
    # What a half imported module leaves behind is not held against the next one.
    'half': 'import os; os.environ["HALF"] = "1"; import broken',
    'broken': 'raise AttributeError("of\\nanother version")',
    'upset_by_half': 'import os; assert "HALF" not in os.environ',
    'exits': 'import sys; sys.exit("no licence")',
    'dies': 'import os; os._exit(7)',
    'says_why': (
        'try:\n    import broken\n'
        'except AttributeError as error:\n    raise ImportError("nicer") from error'
    ),
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, code in MODULES.items():
        (tmp_path / f'{name}.py').write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    monkeypatch.setenv('PYTHONPATH', path)


def failures_of(*names):
    return {failure.module: failure for failure in find_import_failures(names)}


@pytest.mark.usefixtures('modules')
def test_modules_that_import():
    assert failures_of('first', 'good', 'needs_first', 'json') == {}


@pytest.mark.usefixtures('modules')
def test_modules_that_do_not_import():
    failures = failures_of(
        *('first', 'lacks', 'half', 'upset_by_half', 'exits', 'dies'),
        *('needs_first', 'says_why', 'lacks_it_too', 'good'),
    )
    errors = {name: failure.error for name, failure in failures.items()}
    assert errors == {
        'lacks': "ModuleNotFoundError: No module named 'not_there'",
        'lacks_it_too': "ModuleNotFoundError: No module named 'not_there'",
        'half': 'AttributeError: of another version',
        'says_why': 'AttributeError: of another version',
        'exits': 'SystemExit: no licence',
        'dies': 'Python ended with status 7',
    }
    not_found = {f.module: f.not_found for f in failures.values() if f.not_found}
    assert not_found == {'lacks': 'not_there', 'lacks_it_too': 'not_there'}
    assert [p for p in failures['half'].raised_in if p in MODULES] == ['broken', 'half']


def test_the_folder_of_the_package_is_not_searched():
    neighbour = 'stack'
    assert (Path(__file__).parents[2] / f'mlla_mm/compat/{neighbour}.py').is_file()
    assert failures_of(neighbour)[neighbour].not_found == neighbour


def test_one_line():
    assert one_line('\n first\n  second ') == 'first second'
    assert len(one_line('word ' * 1000)) <= 300
