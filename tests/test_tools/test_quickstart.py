# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import re
import subprocess
import sys

import pytest

from ..processes import ROOT


def test_unknown_task(run_tool):
    result = run_tool('bash', 'tools/quickstart.sh', 'tracking', check=False)
    assert result.returncode == 2
    assert "no task 'tracking'; there are detection, segmentation" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, least',
    [
        ('detection', {'bbox_mAP': 0.60, 'segm_mAP': 0.55}),
        ('segmentation', {'mIoU': 60, 'mIoU (multi-scale)': 60}),
        ('classification', {'accuracy/top1': 95, 'accuracy/top1 (EMA)': 95}),
    ],
)
def test_quickstart(tmp_path, task, least):
    """The whole demo in a clone, twice: the second run reuses the first one's.

    Then the model as an ONNX file has the same metrics.
    """
    pytest.importorskip('onnxruntime')
    subprocess.run(['git', 'clone', '--quiet', ROOT, tmp_path / 'clone'], check=True)
    command = (
        f'export VIRTUAL_ENV={sys.prefix} PATH={sys.prefix}/bin:$PATH; '
        f'bash tools/quickstart.sh {task}'
    )
    for seconds in (1800, 300):
        output = subprocess.run(
            ['bash', '-c', command],
            cwd=tmp_path / 'clone',
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds,
        ).stdout
        for name, value in least.items():
            found = re.search(rf'^{re.escape(name)}: ([\d.]+)$', output, re.M)
            assert float(found[1]) >= value, name
        for picture in ('predictions', 'curves'):
            assert list((tmp_path / 'clone').glob(f'work_dirs/*/{picture}.png'))
    assert 'Reusing work_dirs/' in output
    (work_dir,) = (tmp_path / 'clone' / 'work_dirs').iterdir()
    (config,) = (tmp_path / 'clone' / 'configs').glob(f'*/{work_dir.name}.py')
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    file = tmp_path / 'model.onnx'
    for tool, *arguments in (
        ('export', checkpoint, '--format', 'onnx', '--out', file),
        ('test', file, '--work-dir', tmp_path / 'exported'),
    ):
        subprocess.run(
            [sys.executable, f'tools/{tool}.py', config, *arguments],
            cwd=tmp_path / 'clone',
            check=True,
            timeout=600,
        )
    expected, found = (
        json.loads(max(folder.glob('*/*.json')).read_text())
        for folder in (work_dir / 'test', tmp_path / 'exported')
    )
    for record in (expected, found):
        del record['time'], record['data_time']
    assert found == pytest.approx(expected, abs=1e-3)
