# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
from mmengine.config import Config
from mmengine.registry import (
    HOOKS,
    MODELS,
    PARAM_SCHEDULERS,
    DefaultScope,
    Registry,
)
from torch import nn, optim

from mlla_mm.apis import load_model
from mlla_mm.engine.arguments import ArgumentError, arguments_of, named_arguments
from mlla_mm.engine.launch import exit_on_user_error

from ..bad_data import assert_says
from ..nano import NANO

PARTS = Registry('parts')


@PARTS.register_module()
class Base:
    def __init__(self, size, colour='red'):
        if colour == 'none':
            paint(colour=colour)
        if colour == 'missing':
            mix()


@PARTS.register_module()
class Derived(Base):
    def __init__(self, weight=1, **kwargs):
        super().__init__(**kwargs)


class Closed(Base):
    def __init__(self, weight):
        super().__init__(weight)


@PARTS.register_module()
class Picky:
    def __init__(self, size=1, package='torch'):
        if size < 0:
            raise ValueError('negative size')
        assert size < 10, 'large size'
        if size == 7:
            raise AssertionError
        if package == 'none':
            raise ImportError('pip install colours')


def paint():
    pass


def mix(size):
    pass


def build(config: dict):
    other = dict(type='Base', size=9, color=9)  # wrong, too
    cfg = Config(dict(first=dict(parts=[other, config])))
    with named_arguments(cfg):
        return PARTS.build(cfg.first.parts[1])


@pytest.mark.parametrize(
    'config, words',
    [
        (dict(type='Base', size=1, color=2),
         ['first.parts.1.color: Base takes no color', 'colour meant', 'size, colour']),
        (dict(type='Derived', size=1, wieght=2),
         ['first.parts.1.wieght', 'Is weight meant', 'weight, size, colour']),
        (dict(type='Base', colour=2), ['first.parts.1 lacks size', 'Base']),
        (dict(type='Derived'), ['first.parts.1 lacks size']),
        (dict(type=Base, size=1, color=2), ['first.parts.1.color: Base takes no']),
    ],
)  # fmt: skip
def test_arguments_of_a_class(config, words):
    with pytest.raises(ArgumentError) as caught:
        build(config)
    assert_says(caught.value, *words)
    assert '\n' not in str(caught.value)


def test_what_is_built_from_a_part_of_a_dict():
    """Heads take some keys out of their configs before they build from them."""
    right, wrong = dict(type='Base', size=1), dict(type='Base', size=2, color=2, own=3)
    with pytest.raises(ArgumentError, match='^parts.1.color: '):
        with named_arguments(Config(dict(parts=[right, wrong]))):
            PARTS.build(dict(type='Base', size=2, color=2))


@pytest.mark.parametrize('colour, name', [('none', 'paint'), ('missing', 'mix')])
def test_a_mistake_inside_a_class_keeps_its_traceback(colour, name):
    with pytest.raises(TypeError, match=name):
        build(dict(type='Base', size=1, colour=colour))


@pytest.mark.parametrize(
    'config, text',
    [
        (dict(size=-1), 'first.parts.1: ValueError: negative size'),
        (dict(size=11), 'first.parts.1: AssertionError: large size'),
        (dict(package='none'), 'pip install colours'),
    ],
)
def test_values_that_a_class_refuses_itself(config, text):
    with pytest.raises(ArgumentError) as caught:
        build(dict(type='Picky', **config))
    assert str(caught.value).startswith(text)


def test_other_errors_of_a_value_keep_their_traceback():
    with pytest.raises(AssertionError):  # which says nothing
        build(dict(type='Picky', size=7))
    with pytest.raises(TypeError, match='not supported between'):
        build(dict(type='Picky', size='1'))


def test_arguments_of_a_part_below():
    head = dict(type='Base', size=1, colour='red')
    cfg = Config(dict(model=dict(type='Picky', colour=1, head=head)))
    with pytest.raises(ArgumentError, match='model.colour.*Is model.head.colour meant'):
        with named_arguments(cfg):
            PARTS.build(cfg.model)


def test_arguments_that_base_classes_take():
    assert arguments_of(Derived) == ['weight', 'size', 'colour']
    assert arguments_of(Closed) == ['weight']
    assert arguments_of(paint) == []
    assert 'lr' in arguments_of(optim.AdamW)


def test_layers_without_a_registry_function():
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(NANO['mmdet'])
    cfg.model.neck.norm_cfg = dict(type='BN', epsilon=1)
    with pytest.raises(ArgumentError, match='^model.neck.norm_cfg.epsilon: '):
        with DefaultScope.overwrite_default_scope('mmdet'), named_arguments(cfg):
            MODELS.build(cfg.model)


@pytest.mark.parametrize('convert', [True, False])
def test_schedulers(convert):
    scheduler = dict(type='CosineAnnealingLR', T_max=3, eta_mim=1)
    if convert:
        scheduler.update(convert_to_iter_based=True)
    other = dict(scheduler, T_max=9)  # wrong, too
    cfg = Config(dict(param_scheduler=[other, scheduler]))
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
    with pytest.raises(ArgumentError) as caught, named_arguments(cfg):
        PARAM_SCHEDULERS.build(
            cfg.param_scheduler[1],
            default_args=dict(optimizer=optimizer, epoch_length=2),
        )
    words = ['param_scheduler.1.eta_mim: CosineAnnealing', 'Is eta_min meant']
    assert_says(caught.value, *words)
    assert 'optimizer' not in str(caught.value)  # MMEngine gives it


def test_tools_print_it_without_a_traceback():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook', begin_iter=1, begn=2)]))
    with pytest.raises(SystemExit, match='^Error: custom_hooks.0.begn: Exp'):
        with exit_on_user_error(()), named_arguments(cfg):
            hook = HOOKS.build(cfg.custom_hooks[0])
            MODELS.build(dict(hook.ema_cfg), default_args=dict(model=nn.Linear(1, 1)))


def test_models_of_inference(tmp_path):
    pytest.importorskip('mmseg')
    import torch

    torch.save(dict(state_dict=dict(x=torch.zeros(1))), tmp_path / 'a.pth')
    cfg = Config.fromfile(NANO['mmseg'])
    cfg.model.decode_head.pool_scale = 3
    with pytest.raises(ValueError, match='decode_head.pool_scale: .*Is pool_scales m'):
        load_model(cfg, tmp_path / 'a.pth', device='cpu')
