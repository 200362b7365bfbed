# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os

import numpy as np
import pytest

from ..bad_data import save
from ..processes import ROOT


@pytest.fixture(scope='module')
def check_dataset(run_tool):
    def run(*arguments, **options):
        tool = ROOT / 'tools/dataset_tools/check_dataset.py'
        return run_tool(
            'python', tool, *arguments, check=False, separate=True, **options
        )

    return run


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory):
    """As many files as ADE20K has: not images, which --fast does not see.

    It looks into a few label maps.
    """
    folder = tmp_path_factory.mktemp('file')
    files = dict(jpg=folder / 'x', png=folder / 'map.png')
    files['jpg'].write_bytes(b'x')
    save(files['png'], np.arange(151, dtype=np.uint8).reshape(1, 151))
    root = tmp_path_factory.mktemp('ade') / 'ADEChallengeData2016'
    for split, count in (('training', 20210), ('validation', 2000)):
        for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
            folder = root / kind / split
            folder.mkdir(parents=True)
            for i in range(count):
                # This is faster than a file each.
                os.link(files[suffix], f'{folder}/{i}.{suffix}')
    return root


def test_complete_data(check_dataset, ade20k):
    result = check_dataset('ade20k', ade20k, '--fast')
    assert result.returncode == 0, result.stdout + result.stderr
    assert f'{ade20k}: names, counts and pairs (--fast) as in ade20k.' in result.stdout
    # No progress bar where there is no terminal.
    assert '\r' not in result.stdout and '[' not in result.stdout


def findings(result):
    """Columns of a table without spaces, for paths decide where lines are broken."""
    rows = [line.split('│')[1:-1] for line in result.stdout.splitlines()]
    columns = zip(*(row for row in rows if len(row) == 3))
    return [''.join(''.join(column).split()) for column in columns]


def test_table_of_findings(check_dataset, ade20k):
    image = ade20k / 'images/validation/7.jpg'
    image.unlink()
    result = check_dataset('ade20k', ade20k, '--fast')
    image.write_bytes(b'x')
    assert result.returncode == 1
    _, wrong, fix = findings(result)
    assert f'1999imagesin{image.parent},expected2000' in wrong
    assert f'havenoimagein{image.parent}:7.png' in wrong
    assert 'ADEChallengeData2016.zip' in fix


def test_missing_folder_and_unknown_data_set(check_dataset, tmp_path):
    result = check_dataset('coco', tmp_path / 'nowhere')
    assert result.returncode == 1
    assert result.stderr.startswith('Error: Folder not found')
    assert check_dataset('pascal', tmp_path).returncode == 2


def test_data_of_a_config(check_dataset, digits_coco, tmp_path):
    config = tmp_path / 'config.py'
    base = ROOT / 'configs/detection/mask-rcnn_mlla-nano_fpn_digits.py'
    config.write_text(
        f"_base_ = '{base}'\n"
        f"train_dataloader = dict(dataset=dict(data_root='{digits_coco}'))\n"
        f"val_dataloader = dict(dataset=dict(data_root='{digits_coco}'))\n"
        'val_evaluator = dict(ann_file=\n'
        f"    '{digits_coco}/annotations/instances_val.json')\n"
    )
    result = check_dataset(config)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'classes of val_dataloader.dataset have no objects' in ' '.join(
        result.stdout.split()
    )
    assert result.stdout.endswith('config.py: no error, but see the warnings.\n')
    config.write_text(config.read_text() + 'model = dict(neck=dict(in_channels=[9]))\n')
    result = check_dataset(config)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: model.neck.in_channels is 9')
    for wrong in (['coco'], [config, 'x']):
        assert check_dataset(*wrong).returncode == 2


def test_findings_in_the_data_of_a_config(check_dataset, tmp_path):
    pytest.importorskip('mmdet')
    config = ROOT / 'configs/detection/mask-rcnn_mlla-t_fpn_1x_coco.py'
    result = check_dataset(config, '--fast', cwd=tmp_path)
    assert result.returncode == 1
    _, wrong, _ = findings(result)
    for split in ('train', 'val'):
        name = f'data/coco/annotations/instances_{split}2017.json'
        assert f'Annotationfilenotfound:{name}' in wrong
