# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The configs that docs/hardware.md shows: built, and run where a CPU can."""

import inspect
import json
import re
import textwrap

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    MODEL_WRAPPERS,
    MODELS,
    RUNNERS,
    STRATEGIES,
    init_default_scope,
)
from mmengine.runner import Runner

from ..processes import ROOT

CONFIGS = ROOT / 'configs' / 'detection'
EXAMPLES = {
    name: textwrap.dedent(code)
    for name, code in re.findall(
        r'<!-- example: (\w+) -->\n *```python\n(.*?)\n *```',
        (ROOT / 'docs' / 'hardware.md').read_text(),
        re.S,
    )
}
pytest.importorskip('mmdet')


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture
def example(tmp_path):
    """Path of an example that inherits from one of our configs."""

    def write(name, base='mask-rcnn_mlla-t_fpn_1x_coco.py'):
        code = EXAMPLES[name]
        assert code.startswith("_base_ = './mask-rcnn_mlla-t_fpn_1x_coco.py'\n")
        _, rest = code.split('\n', 1)
        path = tmp_path / f'{name}.py'
        path.write_text(f"_base_ = '{CONFIGS / base}'\n{rest}\n")
        return path

    return write


@pytest.fixture
def demo(example, digits_coco, tmp_path):
    """An example on the demo's model and data, without data workers."""

    def read(name):
        cfg = Config.fromfile(example(name, 'mask-rcnn_mlla-nano_fpn_digits.py'))
        loader = cfg.train_dataloader
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=f'{digits_coco}/', indices=4)
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.train_cfg.max_epochs = 1
        cfg.update(launcher='none', work_dir=str(tmp_path / 'work'), log_level='ERROR')
        return cfg

    return read


def test_all_are_tested():
    assert list(EXAMPLES) == [
        'with_cp', 'float16', 'bfloat16', 'accumulation', 'zero', 'fsdp',
    ]  # fmt: skip


def test_recomputed_blocks(example, demo):
    cfg = Config.fromfile(example('with_cp'))
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert all(stage.with_cp for stage in model.backbone.layers)
    runner = Runner.from_cfg(demo('with_cp'))
    runner.train()
    assert runner.iter == 1


@pytest.mark.parametrize('name', ['float16', 'bfloat16'])
def test_mixed_precision(example, monkeypatch, name):
    module = 'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available'
    monkeypatch.setattr(module, lambda: True)
    cfg = Config.fromfile(example(name))
    wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), cfg.optim_wrapper)
    assert type(wrapper).__name__ == 'AmpOptimWrapper'
    assert wrapper.cast_dtype == getattr(torch, name)
    assert wrapper._scale_update_param == (None if name == 'float16' else 1.0)
    assert wrapper.optimizer.param_groups[0]['lr'] == 1e-4


def test_accumulation(demo):
    cfg = demo('accumulation')
    assert cfg.train_dataloader.batch_size == 1
    runner = Runner.from_cfg(cfg)
    runner.train()
    # Four images one by one, and an update for every two of them.
    assert runner.iter == 4
    state = next(iter(runner.optim_wrapper.optimizer.state.values()))
    assert state['step'] == 2


@pytest.mark.slow
def test_zero(example, run_tool, digits_coco, tmp_path):
    """On two processes: --check trains, saves, and resumes."""
    config = example('zero', 'mask-rcnn_mlla-nano_fpn_digits.py')
    output = run_tool(
        'bash', 'tools/dist_train.sh', config, 2, '--check',
        '--work-dir', tmp_path / 'work', '--cfg-options',
        f'train_dataloader.dataset.data_root={digits_coco}/',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False', 'train_cfg.max_epochs=2',
        'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None',
    ).stdout  # fmt: skip
    assert 'Check passed' in output


def test_fsdp(example, tmp_path):
    cfg = Config.fromfile(example('fsdp'))
    assert RUNNERS.get(cfg.runner_type).__name__ == 'FlexibleRunner'
    strategy = STRATEGIES.build(dict(cfg.strategy, work_dir=str(tmp_path)))
    assert strategy._is_full_state_dict()
    options = dict(strategy.model_wrapper)
    wrapper = MODEL_WRAPPERS.get(options.pop('type'))
    inspect.signature(wrapper).bind(module=None, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', ['float16', 'bfloat16', 'fsdp'])
def test_on_a_gpu(example, run_tool, digits_coco, tmp_path, name):
    """Losses are numbers, and the checkpoint is one of the model without a wrapper."""
    config = example(name, 'mask-rcnn_mlla-nano_fpn_digits.py')
    run_tool(
        'bash', 'tools/dist_train.sh', config, 1, '--work-dir', tmp_path / 'work',
        '--cfg-options', f'train_dataloader.dataset.data_root={digits_coco}/',
        'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1',
        'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None',
        env={'CUDA_VISIBLE_DEVICES': '0'},
    )  # fmt: skip
    (log,) = (tmp_path / 'work').glob('*/vis_data/scalars.json')
    losses = [json.loads(line)['loss'] for line in log.read_text().splitlines()]
    # 16 images in batches of 4.
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)
    checkpoint = torch.load(
        tmp_path / 'work' / 'epoch_1.pth', map_location='cpu', weights_only=False
    )
    model = MODELS.build(Config.fromfile(config).model)
    model.load_state_dict(checkpoint['state_dict'])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    # float16 alone needs a greater loss, for its small gradients.
    scale = checkpoint['optimizer'].get('loss_scaler', {}).get('scale')
    if name == 'float16':
        assert scale > 1
    else:
        assert scale == (1 if name == 'bfloat16' else None)
