# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
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
    """The whole demo in a clone, twice: the second run reuses the first one's."""
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
