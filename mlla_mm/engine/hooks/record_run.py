# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS

from ...compat.openmmlab import checkpoint_of, is_resumed
from ...utils.files import write_whole
from .weights import UseEMAWeightsHook

RUN_NAME = 'run.json'


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
    - ``checkpoint`` (str | null): Name of the file that the run starts from.
    - ``test_time_augmentation`` (bool): Whether it is used.
    - ``averaged_weights`` (bool): Whether a checkpoint's average is tested.
    """

    @master_only
    def before_run(self, runner) -> None:
        cfg, model = runner.cfg, runner.model
        if is_model_wrapper(model):
            model = model.module
        loop = cfg.get('train_cfg') or {}
        by_epoch = 'max_iters' not in loop
        checkpoint = checkpoint_of(runner)
        content = dict(
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
        path = Path(runner.log_dir) / 'vis_data' / RUN_NAME
        write_whole(path, json.dumps(content, indent=2).encode())
