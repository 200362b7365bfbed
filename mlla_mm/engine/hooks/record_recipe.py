# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import logging
from pathlib import Path
from typing import Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ...compat.stack import collect_stack
from ...utils.collect_env import collect_env
from .. import recipe as recipes

RECORD_NAME = 'recipe.json'


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
            if self.recipe['processes']:
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
