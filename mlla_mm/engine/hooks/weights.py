# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which of a checkpoint's weights a model gets, and whether they fit."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, List, Optional

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...checkpoints.fit import check_fit, load_strictly
from ...checkpoints.layout import (
    SWAPPED_KEY,
    class_names,
    describe,
    find_weights,
    require_average,
    with_metadata,
    without_module,
)
from ...checkpoints.new_classes import OtherClasses, find_other_classes
from ...compat.openmmlab import is_resumed, is_training
from ...models.fusing import fuse_conv_bn
from ...reproducible.resume import source_of
from ...utils.text import PATH_LIMIT, printable


def unwrap(model: Any) -> Any:
    """The model inside wrappers for several processes and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


@HOOKS.register_module()
class FreshHeadsHook(Hook):
    """Let a training start from a whole model of other classes, by ``load_from``.

    The tensors whose shapes depend on the number of classes keep the values that the
    model has initialised. The log says which. All else is left to
    :class:`CheckWeightsHook`, and so are resuming and testing. But a resumed EMAHook
    loads the average and the plain weights before that hook, so they are checked here.
    """

    # Before any hook that takes weights, such as EMAHook.
    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._lines: List[str] = []

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if is_resumed(runner) and SWAPPED_KEY in checkpoint:
            for ema in (False, None):
                _require_fit(runner, checkpoint, ema)
        if is_resumed(runner) or not is_training(runner) or not _loads_itself(runner):
            return
        own = unwrap(runner.model).state_dict()
        weights = _weights(checkpoint)
        parts = find_other_classes(runner.cfg.get('model') or {}, own, weights)
        if not parts:
            return
        fresh = {name: own[name] for part in parts for name in part.names}
        checkpoint['state_dict'] = with_metadata(
            OrderedDict({**weights, **fresh}), weights
        )
        if isinstance(checkpoint.get(SWAPPED_KEY), Mapping):
            plain = {f'module.{name}': value for name, value in fresh.items()}
            checkpoint[SWAPPED_KEY] = {**checkpoint[SWAPPED_KEY], **plain}
        names = class_names(checkpoint)
        self._lines = [_line(source_of(runner), part, names) for part in parts]

    # After all checks of the weights.
    def before_train(self, runner) -> None:
        for line in self._lines:
            print_log(line, logger='current')


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Refuse a checkpoint that does not fit the model.

    MMEngine loads the weights that fit, warns of the rest and continues, for
    ``load_from``, resuming and testing. A model with a backbone of ours and the file
    have to have the same names and shapes. For other models see
    :func:`mlla_mm.checkpoints.fit.load_strictly`; the strategies of MMEngine's
    FlexibleRunner load them as they do.

    Raises:
        CheckpointError: If the checkpoint does not fit.
    """

    # After the hooks that choose among a checkpoint's weights.
    priority = 'VERY_LOW'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        _require_fit(runner, checkpoint)


@HOOKS.register_module()
class UseEMAWeightsHook(Hook):
    """Load a checkpoint's averaged weights instead of its plain ones.

    Raises:
        CheckpointError: If the checkpoint has no averaged weights.
    """

    # Before any hook that takes weights. EMAHook would swap its average with them.
    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        source = source_of(runner)
        require_average(checkpoint, source)
        checkpoint['state_dict'] = find_weights(checkpoint, source, ema=True)
        # mmpretrain's EMAHook would load and evaluate the plain ones.
        checkpoint.pop(SWAPPED_KEY, None)


@HOOKS.register_module()
class FuseConvBNHook(Hook):
    """Fold BatchNorm into the convolution before it, after a test has loaded weights.

    The averaged models of MMEngine's EMAHook are folded too, because the hook swaps
    their weights with the model's. See :func:`mlla_mm.models.fusing.fuse_conv_bn`.
    """

    def before_test(self, runner) -> None:
        averages = [x.ema_model.module for x in runner.hooks if isinstance(x, EMAHook)]
        for model in (runner.model, *averages):
            fuse_conv_bn(model.eval())


def _require_fit(runner: Any, checkpoint: dict, ema: Optional[bool] = None) -> None:
    """Refuse weights that do not fit; ``ema`` is :func:`find_weights`'s."""
    model = unwrap(runner.model)
    own, source = model.state_dict(), source_of(runner)
    if describe(own) is not None:
        check_fit(own, find_weights(checkpoint, source, ema), source)
    elif _loads_itself(runner):
        # Only loading tells. MMEngine then does it again.
        weights = _weights(checkpoint)
        if ema is not None:
            weights = find_weights(checkpoint, source, ema)
        load_strictly(model, weights, source)


def _loads_itself(runner: Any) -> bool:
    """Whether MMEngine's runner loads the weights, and no strategy such as FSDP's."""
    return isinstance(runner, Runner)


def _weights(checkpoint: dict) -> Mapping:
    """What MMEngine loads from a checkpoint."""
    return without_module(checkpoint.get('state_dict', checkpoint))


def _line(source: str, part: OtherClasses, classes: Sequence[str]) -> str:
    """Say which modules of a part start fresh, and why."""
    names = ''
    if len(classes) == part.in_file:
        names = f' ({", ".join(classes[:3])}{", …" if len(classes) > 3 else ""})'
    modules = dict.fromkeys(name.rpartition('.')[0] for name in part.names)
    return (
        f'{printable(source, PATH_LIMIT)} has {part.in_file} classes{names}, the model '
        f'{part.in_model}. These start fresh: {", ".join(modules)}.'
    )
