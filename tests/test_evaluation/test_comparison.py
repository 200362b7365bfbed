# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os

import cv2
import pytest

from mlla_mm.evaluation.comparison import compare_with_paper
from mlla_mm.evaluation.runs import Deviation, read_run

from .work_dirs import add_session, coco_log, coco_metrics

CLASSIFIER = dict(config='mlla-t_8xb128_in1k', length=300)
SEGMENTOR = dict(
    config='upernet_mlla-b_8xb2-160k_ade20k-512x512', unit='iteration', length=160000
)
AS_RECIPE = {
    'total batch': dict(recipe=16, actual=16),
    'TF32': dict(recipe=None, actual=True),
    'PyTorch': dict(recipe=None, actual='2.11.0'),
}


def cells(report: str, metric: str) -> list:
    """Measured, published and difference of every row of a metric."""
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in report.splitlines()
        if line.startswith('|')
    ]
    return [row[3:] for row in rows if row[2] == metric]


def test_finished_run(tmp_path):
    add_session(tmp_path, '1', entries=coco_log(range(1, 13)), record=AS_RECIPE)
    report, within = compare_with_paper([tmp_path], tmp_path / 'out')
    assert within
    assert cells(report, 'box AP') == [['46.80', '46.8', '+0.00']]
    assert cells(report, 'mask AP75') == [['45.00', '45', '+0.00']]
    assert 'finished, 12 epochs' in report
    assert 'No deviation' in report
    assert 'PyTorch 2.11.0' in report
    assert (tmp_path / 'out' / 'comparison.md').read_text() == report
    picture = cv2.imread(str(tmp_path / 'out' / 'comparison.png'))
    assert picture.shape[1] > picture.shape[0] > 300


@pytest.mark.parametrize(
    'box, tolerance, within',
    [
        (0.463, 0.5, True),
        (0.462, 0.5, False),
        (0.473, 0.5, True),
        (0.474, 0.5, False),  # a run that is too good has a cause as well
        (0.462, 0.6, True),
        (0.467, 0, False),
        (float('nan'), 0.5, False),
    ],
)
def test_tolerance(tmp_path, box, tolerance, within):
    log = [*coco_log(range(1, 12)), dict(coco_metrics(box, 0.421), step=12)]
    add_session(tmp_path, '1', entries=log)
    report, found = compare_with_paper([tmp_path], tmp_path, tolerance)
    assert found is within
    assert (f'(beyond {tolerance:g})' in report) is not within


def test_running_run_is_not_judged(tmp_path):
    session = add_session(tmp_path, '1', entries=coco_log(range(1, 4)))
    with open(session / 'vis_data' / 'scalars.json', 'a') as log:
        log.write(
            '{"loss": 0.5, "epoch": 4, "iter": 13, "step": 13}\n{"loss": 0.4, "ep'
        )
    report, within = compare_with_paper([tmp_path], tmp_path)
    assert within
    assert 'running or interrupted, epoch 4 of 12' in report
    assert 'validation, epoch 3 of 12' in report
    ((measured, published, difference),) = cells(report, 'box AP')
    assert float(measured) < 40 and published == '46.8'
    assert difference.endswith('(training not finished)')
    assert read_run(tmp_path).curves['loss'][-1] == (13, 0.5)


def test_run_that_has_just_begun(tmp_path):
    add_session(tmp_path, '1', entries=coco_log([1])[:2])
    report, within = compare_with_paper([tmp_path], tmp_path)
    assert within
    assert 'Nothing has been evaluated yet.' in report
    assert (tmp_path / 'comparison.png').is_file()


def test_resumed_training_is_one_run(tmp_path):
    add_session(tmp_path, '1', entries=coco_log(range(1, 6)), record=AS_RECIPE)
    record = {**AS_RECIPE, 'total batch': dict(recipe=16, actual=8)}
    add_session(
        tmp_path, '2', entries=coco_log(range(5, 13)), record=record, resumed=True
    )
    run = read_run(tmp_path)
    assert run.progress == 'finished, 12 epochs'
    assert [step for step, _ in run.curves['coco/bbox_mAP']] == list(range(1, 13))
    assert run.deviations == [Deviation('total batch', 16, 8)]


def test_a_new_training_replaces_the_one_before(tmp_path):
    add_session(tmp_path, '1', entries=coco_log(range(1, 13)))
    add_session(tmp_path, '2', tested=coco_metrics(0.4, 0.4), checkpoint='epoch_12.pth')
    add_session(tmp_path, '3', entries=coco_log(range(1, 3)))
    run = read_run(tmp_path)
    assert run.progress == 'running or interrupted, epoch 2 of 12'
    assert [e.name for e in run.evaluations] == ['validation, epoch 2 of 12']


def test_deviations(tmp_path):
    record = {
        **AS_RECIPE,
        'total batch': dict(recipe=16, actual=4),
        'learning rate': dict(recipe=1e-4, actual=2.5e-5),
        'pretrained weights': dict(recipe=['data/MLLA_T.pth'], actual=None),
    }
    add_session(tmp_path, '1', entries=coco_log([1]), record=record)
    report, _ = compare_with_paper([tmp_path], tmp_path)
    lines = [''.join(line.split()) for line in report.splitlines()]
    assert '|totalbatch|16|4|' in lines
    assert '|learningrate|0.0001|2.5e-05|' in lines
    assert '|pretrainedweights|data/MLLA_T.pth|-|' in lines
    assert 'recipe.json is missing' not in report


def test_missing_record_is_said(tmp_path):
    add_session(tmp_path, '20260101_000000', entries=coco_log([1]))
    report, _ = compare_with_paper([tmp_path], tmp_path)
    assert 'recipe.json is missing in 20260101_000000' in report
    assert 'No deviation' not in report


def test_tests_of_checkpoints(tmp_path):
    """Nothing was trained here: the authors' weights, say."""
    tested = dict(SEGMENTOR, checkpoint='b.pth')
    add_session(tmp_path, '1', tested=dict(mIoU=51.2, aAcc=84.0), **tested)
    add_session(tmp_path, '2', tested=dict(mIoU=51.95), **tested)
    tested['test_time_augmentation'] = True
    add_session(tmp_path, '3', tested=dict(mIoU=52.0), **tested)
    report, within = compare_with_paper([tmp_path], tmp_path, tolerance=0.4)
    assert not within
    assert 'no training here' in report
    # The newer one of two tests alike, and the one with augmentation.
    assert cells(report, 'mIoU') == [['51.95', '51.9', '+0.05']]
    assert cells(report, 'mIoU(ms+flip)') == [
        ['52.00', '52.5', '**-0.50** (beyond 0.4)']
    ]
    assert not (tmp_path / 'comparison.png').exists()


def test_test_of_an_early_checkpoint_is_not_judged(tmp_path):
    add_session(tmp_path, '1', entries=coco_log(range(1, 13)))
    add_session(tmp_path, '2', tested=coco_metrics(0.4, 0.4), checkpoint='epoch_3.pth')
    report, within = compare_with_paper([tmp_path], tmp_path)
    assert within
    assert 'test of epoch_3.pth' in report


def test_averaged_weights_have_no_published_figure(tmp_path):
    log = [
        dict(loss=3.0, epoch=300, iter=9, step=9),
        {'accuracy/top1': 83.4, 'ema_accuracy/top1': 70.0, 'step': 300},
    ]
    add_session(tmp_path, '1', entries=log, **CLASSIFIER)
    add_session(
        tmp_path,
        '2',
        tested={'accuracy/top1': 71.0},
        checkpoint='epoch_300.pth',
        averaged_weights=True,
        **CLASSIFIER,
    )
    report, within = compare_with_paper([tmp_path], tmp_path)
    assert within
    assert cells(report, 'Top 1 Accuracy') == [['83.40', '83.5', '-0.10']]
    assert cells(report, 'Top 1 Accuracy (averaged weights)') == [
        ['70.00', '-', '-'],
        ['71.00', '-', '-'],
    ]


def test_several_runs_in_one_table(tmp_path):
    add_session(tmp_path / 'a', '1', entries=coco_log(range(1, 13)))
    add_session(
        tmp_path / 'b', '1', 'mask-rcnn_mlla-nano_fpn_digits',
        entries=coco_log(range(1, 4)), length=3,
    )  # fmt: skip
    report, within = compare_with_paper([tmp_path / 'a', tmp_path / 'b'], tmp_path)
    assert within
    (first, second) = cells(report, 'box AP')
    assert first[1:] == ['46.8', '+0.00']
    assert second[1:] == ['-', '-']
    assert 'Nothing is published about a config named mask-rcnn_mlla-nano' in report
    one = compare_picture_height(tmp_path / 'a', tmp_path / 'one')
    both = cv2.imread(str(tmp_path / 'comparison.png'))
    assert both.shape[0] == pytest.approx(2 * one, abs=2)


def compare_picture_height(work_dir, out) -> int:
    compare_with_paper([work_dir], out)
    return cv2.imread(str(out / 'comparison.png')).shape[0]


def test_config_name(tmp_path):
    """Two configs in one work_dir: that of the newest run counts."""
    add_session(tmp_path, '1', entries=[], **SEGMENTOR)
    add_session(tmp_path, '2', 'a $config$', entries=coco_log([1]))
    report, _ = compare_with_paper([tmp_path], tmp_path)
    assert read_run(tmp_path).config == 'a $config$'
    assert 'about a config named a $config$' in report


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'No run in {tmp_path}'):
        compare_with_paper([tmp_path], tmp_path)
    with pytest.raises(ValueError, match='at least 0 points, got -1'):
        compare_with_paper([tmp_path], tmp_path, tolerance=-1)


# What a work_dir of somebody else may have.


def test_a_config_in_a_work_dir_is_not_run(tmp_path):
    marker = tmp_path / 'ran'
    program = f'open({str(marker)!r}, "w").close()\ntrain_cfg = dict(max_epochs=12)\n'
    session = add_session(tmp_path / 'w', '1', entries=coco_log(range(1, 13)))
    old = tmp_path / 'w' / '0'
    (old / 'vis_data').mkdir(parents=True)
    for folder in (session / 'vis_data', old / 'vis_data', tmp_path / 'w'):
        (folder / 'config.py').write_text(program)
    report, within = compare_with_paper([tmp_path / 'w'], tmp_path / 'out')
    assert within
    assert 'run.json is missing in 0: left out' in report
    (session / 'vis_data' / 'run.json').unlink()
    with pytest.raises(FileNotFoundError, match='no TIME/vis_data/run.json') as error:
        compare_with_paper([tmp_path / 'w'], tmp_path / 'out')
    assert 'tools/test.py CONFIG CHECKPOINT --work-dir' in str(error.value)
    assert not marker.exists()


def test_links_are_not_written_through(tmp_path):
    work_dir, other = tmp_path / 'w', tmp_path / 'thesis.txt'
    add_session(work_dir, '1', entries=coco_log([1]))
    other.write_text('words')
    for name in ('comparison.md', 'comparison.png'):
        (work_dir / name).symlink_to(other)
    report, _ = compare_with_paper([work_dir], work_dir)
    assert other.read_text() == 'words'
    assert (work_dir / 'comparison.md').read_text() == report
    assert cv2.imread(str(work_dir / 'comparison.png')) is not None


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def written(content):
    return lambda path: path.write_bytes(content)


FILES = {
    'log': 'vis_data/scalars.json',
    'run': 'vis_data/run.json',
    'recipe': 'recipe.json',
    'test': '1.json',
}
DEEP = b'{"a":' * 10**5 + b'1' + b'}' * 10**5


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize(
    'damage, reason',
    [
        (pipe, 'is no file'),
        (written(bytes(range(256))), 'holds no JSON object'),
        (written(b'[1, 2]'), 'holds no JSON object'),
        (written(b'{"a": %s}' % (b'1' * 2**20)), 'longer than 1048576 bytes'),
        (written(DEEP), 'recursion'),
        (written(b'{"\x1b[2J": tru}'), 'holds no JSON object'),
    ],
)
def test_damaged_files(tmp_path, name, damage, reason):
    session = add_session(
        tmp_path, '1', entries=coco_log([1]), tested=coco_metrics(0.4, 0.4),
        record=AS_RECIPE, checkpoint='epoch_1.pth',
    )  # fmt: skip
    damage(session / FILES[name])
    with pytest.raises(ValueError) as error:
        compare_with_paper([tmp_path], tmp_path)
    said = str(error.value)
    assert str(session / FILES[name]) in said and reason in said
    assert 'Move its folder out' in said
    assert said.isprintable()


@pytest.mark.parametrize(
    'field, value',
    [
        ('config', None),
        ('unit', 'fortnight'),
        ('unit', []),
        ('length', '12'),
        ('length', True),
        ('resumed', 1),
        ('checkpoint', ['epoch_1.pth']),
        ('averaged_weights', 'no\x1b[2J'),
    ],
)
def test_a_run_that_does_not_say_what_it_is(tmp_path, field, value):
    add_session(tmp_path, '1', **{field: value})
    with pytest.raises(ValueError) as error:
        read_run(tmp_path)
    said = str(error.value)
    assert 'run.json' in said and f'{field} is' in said and 'Move its folder' in said
    assert said.isprintable()


@pytest.mark.parametrize(
    'record', [{'lr': 1}, {'lr': {}}, {'lr': dict(recipe=[1], actual=2)}]
)
def test_a_record_that_is_no_recipe(tmp_path, record):
    add_session(tmp_path, '1', entries=[], record=record)
    with pytest.raises(ValueError, match='recipe.json is no record .*: lr is'):
        read_run(tmp_path)


@pytest.mark.parametrize('step', ['null', '"1"', 'NaN', 'Infinity', '1' + '0' * 400])
def test_a_log_without_steps(tmp_path, step):
    session = add_session(tmp_path, '1', entries=[])
    (session / 'vis_data' / 'scalars.json').write_text(f'{{"step": {step}}}\n')
    with pytest.raises(ValueError, match='scalars.json is no log of a training'):
        read_run(tmp_path)


def test_no_number_of_a_log_stops_the_report(tmp_path):
    huge = 10**400
    session = add_session(
        tmp_path, '1', entries=[
            dict(loss=1.0, epoch=float('inf'), iter=1, step=1),
            {'coco/bbox_mAP': huge, 'coco/segm_mAP': True, 'step': 1},
        ],
        tested={'coco/bbox_mAP': huge, 'coco/segm_mAP': '46'}, checkpoint='e.pth',
    )  # fmt: skip
    # Where a loss of power cut the log.
    with open(session / 'vis_data' / 'scalars.json', 'ab') as log:
        log.write(b'\0' * 99)
    report, _ = compare_with_paper([tmp_path], tmp_path)
    assert 'epoch 0 of 12' in report
    assert 'Nothing has been evaluated yet.' in report


def test_what_is_shown_moves_no_cursor(tmp_path):
    evil = 'a\x1b[2J\nb\u202e'
    record = {
        evil: dict(recipe=[evil], actual=evil),
        'x': dict(recipe=None, actual=evil),
    }
    add_session(
        tmp_path / 'w', '1', evil, entries=coco_log([1]), record=record,
        tested=coco_metrics(0.4, 0.4), checkpoint=evil,
    )  # fmt: skip
    report, _ = compare_with_paper([tmp_path / 'w'], tmp_path / 'out')
    assert all(line.isprintable() for line in report.split('\n'))
    assert report.count('a\\x1b[2J\\nb\\u202e') >= 6
