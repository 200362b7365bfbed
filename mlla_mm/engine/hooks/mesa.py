# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import Dict, Optional

import torch
from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner.amp import autocast

from ...checkpoints.layout import EMA_KEY
from ...checkpoints.reader import CheckpointError
from ...compat.openmmlab import batches_of_update
from ..ema import ModelEMA, recipe_decay
from ..wrappers import unwrap


@HOOKS.register_module()
class MESAHook(Hook):
    """Average the weights while training, and let the average teach the model.

    - The average starts at the initial or loaded weights and takes in the model after
      every optimiser step: once per accumulated batch, and also when mixed precision
      skips the step.
    - From epoch ``int(start * max_epochs)`` on, counted from 0, it is the teacher of a
      :class:`mlla_mm.models.classifiers.MESAClassifier`.
    - After each validation of the model it is validated too; its metrics have the
      prefix ``ema_``, as in ``ema_accuracy/top1``.
    - Checkpoints hold the model's weights in ``state_dict`` and the average in
      ``state_dict_ema``, under the same names; resuming goes on from both.

    Args:
        decay (float, optional): Part of the average that an update keeps. None follows
            the recipe with the total batch size B (processes x batch x accumulated
            batches): 0.9996 ** (B / 4096). Defaults to None.
        start (float): Part of the epochs that is trained without a teacher, in [0, 1].
            Defaults to 0.25.

    Raises:
        ValueError: If ``start`` is out of range.
    """

    # After the synchronisation of buffers, before logs (BELOW_NORMAL) and checkpoints.
    priority = 'NORMAL'

    def __init__(self, decay: Optional[float] = None, start: float = 0.25) -> None:
        if not 0 <= start <= 1:
            raise ValueError(f'start must be in [0, 1], got {start}.')
        self.decay = decay
        self.start = start
        self.ema: Optional[ModelEMA] = None
        self._loaded: Optional[dict] = None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self._loaded = checkpoint.get(EMA_KEY)

    # Not before_run: weights are initialised or loaded after it.
    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        if not hasattr(model, 'set_teacher'):
            raise ValueError(
                'MESAHook teaches a MESAClassifier, but the model is a '
                f'{type(model).__name__}. Change model.type or remove the hook.'
            )
        self.ema = ModelEMA(model, self._get_decay(runner))
        if runner.iter > 0:
            self._resume()
        self._loaded = None

    def before_train_epoch(self, runner) -> None:
        if runner.epoch >= int(self.start * runner.max_epochs):
            unwrap(runner.model).set_teacher(self.ema.module)

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        # True right after the iteration that made a step.
        if runner.optim_wrapper.should_update():
            self.ema.update(unwrap(runner.model))

    def after_train_epoch(self, runner) -> None:
        # BatchNorm statistics differ between processes, and so do their averages.
        all_reduce_params(self.ema.module.buffers(), op='mean')

    def after_val_epoch(
        self, runner, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        if self.ema is None:  # validation without training
            return
        own = {f'ema_{key}': value for key, value in self._evaluate(runner).items()}
        # For the best checkpoint, and for the log.
        metrics.update(own)
        RuntimeInfoHook().after_val_epoch(runner, own)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint[EMA_KEY] = self.ema.state_dict()

    def after_train(self, runner) -> None:
        unwrap(runner.model).set_teacher(None)

    def _get_decay(self, runner) -> float:
        if self.decay is not None:
            return self.decay
        total_batch_size = (
            runner.world_size
            * runner.train_dataloader.batch_sampler.batch_size
            * batches_of_update(runner.optim_wrapper)
        )
        decay = recipe_decay(total_batch_size)
        print_log(
            f'EMA decay {decay:.8f} for a total batch size of {total_batch_size}.',
            logger='current',
        )
        return decay

    def _resume(self) -> None:
        if self._loaded is None:
            raise ValueError(
                f"The checkpoint to resume has no averaged weights ('{EMA_KEY}'): it "
                'was trained without MESAHook. Start from its weights with load_from '
                'instead, or remove the hook.'
            )
        self.ema.load_state_dict(self._loaded)

    @torch.no_grad()
    def _evaluate(self, runner) -> Dict[str, float]:
        loop = runner.val_loop
        for data_batch in loop.dataloader:
            with autocast(enabled=loop.fp16):
                outputs = self.ema.module.val_step(data_batch)
            loop.evaluator.process(data_samples=outputs, data_batch=data_batch)
        return loop.evaluator.evaluate(len(loop.dataloader.dataset))


@HOOKS.register_module()
class UseEMAWeightsHook(Hook):
    """Load a checkpoint's averaged weights instead of its plain ones."""

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if EMA_KEY not in checkpoint:
            raise CheckpointError(
                f"The checkpoint has no averaged weights ('{EMA_KEY}'): it was "
                'trained without MESAHook. Leave --ema out.'
            )
        checkpoint['state_dict'] = checkpoint[EMA_KEY]
