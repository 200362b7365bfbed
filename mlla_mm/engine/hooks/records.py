# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Files in which a run describes itself."""

import json
import logging
from pathlib import Path
from typing import Optional

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ...checkpoints.layout import SWAPPED_KEY
from ...compat.openmmlab import checkpoint_of, is_resumed, is_training
from ...compat.stack import collect_stack
from ...utils.collect_env import collect_env
from ...utils.files import write_whole
from .. import recipe as recipes
from .weights import UseEMAWeightsHook

RECORD_NAME = 'recipe.json'
RUN_NAME = 'run.json'


@HOOKS.register_module()
class RecordRecipeHook(Hook):
    """Log where a run differs from its recipe, and save it in a file.

    Before the training the hook logs a table of recipe and run. It writes the same
    content, with the versions of the packages, to ``recipe.json`` in the run's log
    folder: a JSON object of ``{"recipe": …, "actual": …}`` by item. A recipe's value is
    null if the recipe does not say.

    Args:
        recipe (dict): From :func:`mlla_mm.engine.recipe.describe_recipe`.
        run (dict): From :func:`mlla_mm.engine.recipe.describe_run`.
        notice (str, optional): A further warning to log. Defaults to None.
    """

    # After the hooks that change what is trained.
    priority = 'LOW'

    def __init__(
        self, recipe: recipes.Items, run: recipes.Items, notice: Optional[str] = None
    ) -> None:
        self.recipe = dict(recipe)
        self.run = dict(run)
        self.notice = notice

    def before_train(self, runner) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            loader = runner.train_dataloader
            accumulated = runner.cfg.optim_wrapper.get('accumulative_counts', 1)
            self.run['updates per epoch'] = len(loader) // accumulated
            if self.recipe.get('processes'):
                self.recipe['updates per epoch'] = recipes.updates_per_epoch(
                    len(loader.dataset),
                    self.recipe['processes'],
                    self.recipe['batch per process']
                    * self.recipe['accumulated batches'],
                    getattr(loader.batch_sampler, 'drop_last', False),
                )
        record = recipes.compare(self.recipe, {**self.run, 'seed': runner.seed})
        print_log(f'The run:\n{recipes.format_record(record)}', logger='current')
        if self.notice:
            print_log(self.notice, logger='current', level=logging.WARNING)
        if is_main_process():
            versions = recipes.compare({}, collect_env(collect_stack()))
            text = json.dumps({**record, **versions}, indent=2)
            (Path(runner.log_dir) / RECORD_NAME).write_text(text)


@HOOKS.register_module()
class RecordRunHook(Hook):
    """Describe a training or test in a file, for programs that read its work_dir later.

    MMEngine saves only the config there, which is a program. The file is
    ``vis_data/run.json`` in the run's log folder, beside the logged values. It is a
    JSON object:

    - ``config`` (str): Name of the config, without suffix.
    - ``unit`` (str): ``epoch`` or ``iteration``: what the training counts.
    - ``length`` (int | null): Length of the training in this unit, if it has one.
    - ``resumed`` (bool): Whether the run continues another one.
    - ``checkpoint`` (str | null): Name of the file that the run starts from, or of the
      exported file that is tested.
    - ``test_time_augmentation`` (bool): Whether it is used.
    - ``averaged_weights`` (bool): Whether a checkpoint's average is tested.
    """

    # Before hooks that change the checkpoint.
    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        self._write(runner, any(isinstance(x, UseEMAWeightsHook) for x in runner.hooks))

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        # MMEngine's EMAHook saves the average as the weights. mmpretrain's may test the
        # others all the same.
        plain = any(getattr(x, 'evaluate_on_ema', True) is False for x in runner.hooks)
        if SWAPPED_KEY in checkpoint and not is_training(runner) and not plain:
            self._write(runner, averaged_weights=True)

    @master_only
    def _write(self, runner, averaged_weights: bool) -> None:
        cfg = runner.cfg
        loop = cfg.get('train_cfg') or {}
        by_epoch = 'max_iters' not in loop
        # An exported file stands for the whole model.
        checkpoint = checkpoint_of(runner) or (cfg.get('model') or {}).get('file')
        content = dict(
            # As MMEngine names the copy of a config that has no file.
            config=Path(cfg.filename or runner.timestamp).stem,
            unit='epoch' if by_epoch else 'iteration',
            length=loop.get('max_epochs' if by_epoch else 'max_iters'),
            resumed=is_resumed(runner),
            checkpoint=Path(checkpoint).name if checkpoint else None,
            test_time_augmentation=any(
                isinstance(module, BaseTTAModel) for module in runner.model.modules()
            ),
            averaged_weights=averaged_weights,
        )
        path = Path(runner.log_dir) / 'vis_data' / RUN_NAME
        write_whole(path, json.dumps(content, indent=2).encode())
