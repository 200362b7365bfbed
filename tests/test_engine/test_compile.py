# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from mlla_mm.engine.compile import compile_backbone
from mlla_mm.engine.hooks import MESAHook
from mlla_mm.models import MLLA, LinearAttentionSwin

from ..compiler import needs_compiler

ARCH = dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@MODELS.register_module()
class Regressor(BaseModel):
    """Counts its training steps that a compiler runs."""

    def __init__(self, kind=MLLA):
        super().__init__()
        self.backbone = kind(ARCH, out_indices=3) if kind else nn.Conv2d(3, 32, 1)
        self.steps_in_graph = 0
        for name, buffer in self.named_buffers():
            if name.endswith('running_var'):
                buffer.uniform_(0.5, 1.5)

    def set_teacher(self, teacher):
        self.teacher = (teacher,)

    def forward(self, inputs, mode):
        maps = self.backbone(inputs)
        loss = (maps[-1] if isinstance(maps, tuple) else maps).square().mean()
        return dict(loss=loss) if mode == 'loss' else list(maps[-1])

    def train_step(self, data, optim_wrapper):
        self.steps_in_graph += int(torch.compiler.is_compiling())
        return super().train_step(data, optim_wrapper)


def train(work_dir, compile, kind=MLLA, hooks=(), flow='train'):
    cfg = Config(dict(compile=compile))
    images = [
        dict(inputs=torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(i)))
        for i in range(2)
    ]
    loader = dict(
        batch_size=2,
        dataset=images,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    runner = Runner(
        Regressor(kind),
        str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(type='SeededEpochBasedTrainLoop', max_epochs=1),
        test_dataloader=loader,
        test_cfg=dict(type='CheckedTestLoop'),
        test_evaluator=dict(type='DumpResults', out_file_path=f'{work_dir}/x.pkl'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='CompileBackboneHook'), *hooks],
        default_scope='mmengine',
        experiment_name=work_dir.name,
        cfg=cfg,
    )
    getattr(runner, flow)()
    return runner


def is_compiled(module):
    return module._compiled_call_impl is not None


@needs_compiler
@pytest.mark.parametrize(
    'compile, flow, kind',
    [
        (dict(backend='eager'), 'train', MLLA),
        (dict(backend='eager'), 'test', MLLA),
        (dict(backend='eager'), 'train', LinearAttentionSwin),
        (False, 'train', MLLA),
        (False, 'test', MLLA),
    ],
)
def test_compile_in_a_config_means_the_backbone(tmp_path, compile, flow, kind):
    runner = train(tmp_path, compile, kind, flow=flow)
    assert is_compiled(runner.model.backbone) == bool(compile)
    assert not is_compiled(runner.model)
    assert runner.model.steps_in_graph == 0
    assert (
        runner.cfg.compile == compile
    )  # checkpoints save the config as it was written


@needs_compiler
def test_the_teacher_is_compiled_as_well(tmp_path):
    hook = MESAHook(decay=0.5)
    runner = train(tmp_path, dict(backend='eager'), hooks=[hook])
    assert is_compiled(hook.ema.module.backbone)
    assert list(hook.ema.module.state_dict()) == list(runner.model.state_dict())


@needs_compiler
@pytest.mark.parametrize(
    'kind, compile',
    [
        (None, dict(backend='eager')),
        (MLLA, dict(backend='eager', target='train_step')),
    ],
)
def test_mmengine_compiles_the_step_of_others(tmp_path, monkeypatch, kind, compile):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f, **_: compiled.append(f) or f)
    runner = train(tmp_path, compile, kind)
    assert [f.__name__ for f in compiled] == ['train_step']
    assert not any(map(is_compiled, runner.model.modules()))


@needs_compiler
def test_compile_backbone():
    torch.manual_seed(0)
    model = nn.Sequential(MLLA(ARCH), nn.Identity()).eval()
    x = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        expected = model(x)
        compile_backbone(model, backend='aot_eager')
        torch.testing.assert_close(model(x), expected)
    assert [is_compiled(module) for module in model] == [True, False]
    with pytest.raises(ValueError, match='Linear has no MLLA'):
        compile_backbone(nn.Linear(1, 1))


@needs_compiler
@pytest.mark.parametrize(
    'options, layouts',
    [
        ({}, False),
        (dict(options=dict(max_autotune=True)), False),
        (dict(mode='reduce-overhead'), None),
        (dict(backend='eager'), None),
    ],
)
def test_layouts_are_left_alone(monkeypatch, options, layouts):
    given = []
    monkeypatch.setattr(MLLA, 'compile', lambda self, **kwargs: given.append(kwargs))
    compile_backbone(MLLA(ARCH), **options)
    (kwargs,) = given
    assert (kwargs.get('options') or {}).get('layout_optimization') == layouts
    assert options.items() <= kwargs.items() or 'options' in options
