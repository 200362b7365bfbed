# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The memory of a run of 2,000 iterations does not grow without end.

Images of any size come, one at a time, so that whatever is kept for each size shows.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from mlla_mm.datasets.digits import make_imagenet

from ..nano import NANO
from ..processes import ROOT

PROBE = """
import json, os
from pathlib import Path
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mlla_mm.ops import rotary

PAGE = os.sysconf('SC_PAGE_SIZE')


def resident(pid):
    return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * PAGE


def children():
    for task in Path('/proc/self/task').iterdir():
        yield from (task / 'children').read_text().split()


@HOOKS.register_module()
class ProbeHook(Hook):
    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.every_n_train_iters(runner, 20):
            return
        tables = [table for pair in rotary._TABLES.values() for table in pair]
        entry = dict(
            iteration=runner.iter + 1,
            main=resident('self') / 2**20,
            workers=sum(map(resident, children())) / 2**20,
            files=len(os.listdir('/proc/self/fd')),
            size=tuple(data_batch['inputs'][0].shape[1:]),
            tables=sum(table.numel() * table.element_size() for table in tables),
        )
        with open(os.environ['PROBE'], 'a') as file:
            file.write(json.dumps(entry) + '\\n')
"""

CONFIG = """
_base_ = {base!r}

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
        )
    ),
    head=dict(in_channels=64),
)
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_root={data!r},
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomResize', scale=[(36, 36), (96, 96)]),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(batch_size=5, dataset=dict(data_root={data!r}))
train_cfg = dict(max_epochs=50)
param_scheduler = dict(end=50)
custom_imports = dict(imports=['mlla_mm', 'mlla_mm.models.classifiers', 'probe'])
custom_hooks = [dict(type='ProbeHook')]
"""

WARM_UP = 1000
# How much more the last 500 iterations may take, in the median, than those before.
# 12 MiB are 24 KiB an iteration, half of a normalised image. What libraries keep for
# each size (oneDNN: up to 1,024 kernels) has an end, but still grows a little.
TOLERANCE = dict(main=12, workers=12, files=2)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='looks into /proc')
def test_memory_and_files_do_not_grow(run_tool, tmp_path):
    pytest.importorskip('mmpretrain')
    data = make_imagenet(tmp_path / 'data', train=40, val=10, size=64)
    (tmp_path / 'probe.py').write_text(PROBE)
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.format(base=str(NANO['mmpretrain']), data=f'{data}/'))
    run_tool(
        'python', 'tools/train.py', config, '--work-dir', tmp_path / 'work',
        env=dict(PYTHONPATH=f'{ROOT}:{tmp_path}', PROBE=str(tmp_path / 'probe.json')),
    )  # fmt: skip
    lines = (tmp_path / 'probe.json').read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    iterations = np.array([entry['iteration'] for entry in entries])
    assert iterations[-1] == 2000
    assert len({tuple(entry['size']) for entry in entries}) > 0.9 * len(entries)
    for name, tolerance in TOLERANCE.items():
        values = np.array([entry[name] for entry in entries])
        first = values[(iterations > WARM_UP) & (iterations <= WARM_UP + 500)]
        last = values[iterations > 1500]
        growth = np.median(last) - np.median(first)
        print(
            f'{name}: {np.median(first):.1f} -> {np.median(last):.1f} '
            f'(from {values.min():.1f} to {values.max():.1f})'
        )
        assert growth <= tolerance, name
    # Rows and columns of at most 24 positions: one table of 32 for each stage.
    print(f'tables: {entries[-1]["tables"]} bytes')
    channels = (8, 16, 32, 64)
    assert entries[-1]['tables'] <= sum(2 * 64 * (c // 4) * 4 for c in channels)
