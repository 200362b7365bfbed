# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
from pathlib import Path
from typing import Any, Dict

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS

from ...compat.openmmlab import checkpoint_of, is_resumed
from ...utils.files import write_whole
from .mesa import UseEMAWeightsHook

RUN_NAME = 'run.json'


@HOOKS.register_module()
class RecordRunHook(Hook):
    """Write down what a training or test is, for those who read its work_dir later.

    MMEngine leaves its config there, which is a program. ``vis_data/run.json`` in the
    run's log folder, beside the logged values, is a JSON object:

    - ``config`` (str): Name of the config, without suffix.
    - ``unit`` (str): ``epoch`` or ``iteration``, which the training counts.
    - ``length`` (int | null): Of the training, in this unit; null if it has none.
    - ``resumed`` (bool): Whether the run goes on with another.
    - ``checkpoint`` (str | null): Name of the file that it starts from.
    - ``test_time_augmentation`` (bool): Whether predictions are means of several.
    - ``averaged_weights`` (bool): Whether a checkpoint's average is tested.
    """

    @master_only
    def before_run(self, runner) -> None:
        text = json.dumps(self._describe(runner), indent=2)
        write_whole(Path(runner.log_dir) / 'vis_data' / RUN_NAME, text.encode())

    def _describe(self, runner) -> Dict[str, Any]:
        cfg, model = runner.cfg, runner.model
        if is_model_wrapper(model):
            model = model.module
        loop = cfg.get('train_cfg') or {}
        by_epoch = 'max_iters' not in loop
        checkpoint = checkpoint_of(runner)
        return dict(
            # As MMEngine names the copy of a config that has no file.
            config=Path(cfg.filename or runner.timestamp).stem,
            unit='epoch' if by_epoch else 'iteration',
            length=loop.get('max_epochs' if by_epoch else 'max_iters'),
            resumed=is_resumed(runner),
            checkpoint=Path(checkpoint).name if checkpoint else None,
            test_time_augmentation=isinstance(model, BaseTTAModel),
            averaged_weights=any(
                isinstance(hook, UseEMAWeightsHook) for hook in runner.hooks
            ),
        )
