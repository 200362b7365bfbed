# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How often an update of the training loop waits for the device."""

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from benchmarks.pretended_cuda import pretended_cuda
from mlla_mm.compat.openmmlab import copy_without_waiting

from ..nano import NANO
from ..pretended import needs_pretended_cuda

pytestmark = needs_pretended_cuda

RECIPE = NANO['mmpretrain'].parents[1] / '_base_/models/mlla_classifier.py'


def waits_of_an_update(cfg, amp, updates=2):
    """The waits of the last of some updates, hooks included."""
    runner = Runner.from_cfg(cfg)
    loop = runner.train_loop
    batches = [batch for batch, _ in zip(loop.dataloader, range(updates))]
    with pretended_cuda() as device:
        runner.model.to('cuda')
        wrapper = dict(cfg.optim_wrapper)
        if amp:
            wrapper.update(type='AmpOptimWrapper', dtype=amp, loss_scale='dynamic')
        runner.optim_wrapper = runner.build_optim_wrapper(wrapper)
        runner.optim_wrapper.initialize_count_status(runner.model, 0, updates)
        runner.param_schedulers = runner.build_param_scheduler(cfg.param_scheduler)
        for name in ('before_run', 'before_train', 'before_train_epoch'):
            runner.call_hook(name)
        runner.model.train()
        copy_without_waiting(runner.model)
        for i, batch in enumerate(batches):
            for data in batch:
                # As the data loader does where there is a GPU.
                data['inputs'] = data['inputs'].pin_memory()
            device.waits.clear()
            loop.run_iter(i, batch)
        runner.call_hook('after_train')
        return device.synchronisations()


@pytest.mark.parametrize('amp', [None, 'float16'])
def test_our_own_waits(amp, digits_imagenet, tmp_path):
    cfg = Config.fromfile(NANO['mmpretrain'])
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.data_root = str(digits_imagenet)
        loader.update(num_workers=0, persistent_workers=False)
    cfg.model.train_cfg = Config.fromfile(RECIPE).model.train_cfg
    cfg.train_dataloader.dataset.pipeline.append(
        dict(type='mlla_mm.datasets.transforms.erasing.DrawErasing', prob=1.0)
    )
    cfg.default_hooks.mesa.start = 0.0
    cfg.work_dir = str(tmp_path)
    found = waits_of_an_update(cfg, amp)
    # The clipped gradient's norm, which MMEngine logs, is always read.
    assert found['item', 'mmengine.optim.optimizer.optimizer_wrapper._clip_grad'] == 1
    own = {key: n for key, n in found.items() if key[1].startswith('mlla_mm.')}
    # The losses and their scale are read at once, for MMEngine's log, too.
    read = 'copy to cpu', 'mlla_mm.reproducible.update_status.read_update'
    assert own == {read: 1}
    assert not any('hooks' in place or 'message_hub' in place for _, place in found)
    # Neither images nor labels wait. GradScaler asks whether gradients are finite.
    assert sum(found.values()) == (3 if amp else 2), found
