# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...compat.pytorch import require_compiler
from ...models.backbones.staged import StagedBackbone
from ..compile import compile_backbone
from .mesa import MESAHook


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Let a config's ``compile`` compile the backbone alone.

    MMEngine compiles the whole training step, in over a hundred graphs for Mask R-CNN.
    It still does so in three cases: if the backbone is neither an MLLA nor a
    LinearAttentionSwin; if ``compile`` names a ``target``; and in its FlexibleRunner,
    which compiles before any hook is called. See
    :func:`mlla_mm.engine.compile.compile_backbone`.

    The backbone of MESA's teacher is compiled, too. The average of MMEngine's EMAHook
    is not, because it is never called.

    Raises:
        ValueError: Before a run, if PyTorch is older than 2.2.
    """

    # After MESAHook has made its copy: PyTorch's versions copy compiled models
    # differently.
    priority = 'LOW'

    def __init__(self) -> None:
        self._written: Any = None

    def before_run(self, runner) -> None:
        written = runner.cfg.get('compile')
        has_ours = any(isinstance(x, StagedBackbone) for x in runner.model.modules())
        has_target = isinstance(written, dict) and 'target' in written
        if written and has_ours and isinstance(runner, Runner) and not has_target:
            require_compiler('compile')
            self._written = written
            runner.cfg.compile = False  # MMEngine reads it before the loop starts

    def before_train(self, runner) -> None:
        averages = [x.ema.module for x in runner.hooks if isinstance(x, MESAHook)]
        self._compile(runner, *averages)

    def before_val(self, runner) -> None:
        self._compile(runner)

    def before_test(self, runner) -> None:
        self._compile(runner)

    def _compile(self, runner, *averages: nn.Module) -> None:
        if self._written is None:
            return
        options = self._written if isinstance(self._written, dict) else {}
        for model in (runner.model, *averages):
            compile_backbone(model, **options)
        # Checkpoints save the config as it was written.
        runner.cfg.compile, self._written = self._written, None
