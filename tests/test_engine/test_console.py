# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the console leaves out, and nothing else; test_tools has whole runs."""

import sys
import warnings

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger

from mlla_mm.engine.console import build_runner, quiet

from ..nano import NANO
from ..processes import restored_state


@pytest.fixture(autouse=True)
def restored():
    with restored_state():
        yield


def test_meaningless_warnings_alone_are_left_out():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        quiet()
        for message in (
            'faster_coco_eval is not installed, metrics will not be computed.',
            'The draw is False, it means that the hook for visualization will not',
            'faster_coco_eval is broken',
            'Checkpoints: faster_coco_eval is not installed',
        ):
            warnings.warn(message, stacklevel=1)
    assert [str(x.message) for x in caught] == [
        'faster_coco_eval is broken',
        'Checkpoints: faster_coco_eval is not installed',
    ]


def test_meaningless_lines_alone_are_left_out(capsys):
    quiet()
    show = sys.modules['mmengine.logging.logger'].print
    for line in ('Could not import OneDL. Skipping', 'Could not import mine', 3, ''):
        show(line)
    show('a', 'b', sep='-')
    assert capsys.readouterr().out == 'Could not import mine\n3\n\na-b\n'


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_what_pycocotools_prints_goes_to_the_log_of_a_detector(scope, tmp_path, capsys):
    coco = pytest.importorskip('pycocotools.coco')
    quiet(scope)
    path = tmp_path / 'run.log'
    MMLogger.get_instance('a run', log_file=str(path))
    coco.COCO()  # says nothing
    data = coco.COCO()
    data.dataset = dict(images=[], annotations=[], categories=[])
    data.createIndex()
    is_logged = 'index created' in path.read_text()
    assert is_logged == (scope == 'mmdet')
    assert ('index created' in capsys.readouterr().out) != is_logged


@pytest.mark.parametrize('verbose', [False, True])
def test_descriptions_are_for_the_log_file(verbose, tmp_path, capsys):
    """The runner describes environment and config. Unknown messages are shown."""
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(NANO['mmpretrain'])
    cfg.update(work_dir=str(tmp_path), experiment_name=f'console-{verbose}')
    runner = build_runner(cfg, verbose)
    runner.logger.info('paramwise_options -- backbone.norm0.weight:lr=0.1')
    runner.logger.info('Of paramwise_options -- there are two')
    runner.logger.warning('Exp name: none')
    (log,) = tmp_path.glob('*/*.log')
    captured = capsys.readouterr()
    console, file = captured.out + captured.err, log.read_text()
    for text in ('System environment:', 'Config:', '- paramwise_options', 'Exp name'):
        assert text in file
        assert (text in console) == verbose
    assert 'Of paramwise_options' in console and 'Of paramwise_options' in file
    assert (str(log) in console) != verbose
