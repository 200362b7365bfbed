# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Private names of the OpenMMLab packages.

"Both" means mmengine 0.10.7 and onedl-mmengine 0.10.12, with the toolboxes of
:mod:`mlla_mm.compat.versions`.
"""

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any, Dict, Optional, Tuple

from mmengine.dist import master_only
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.model import BaseDataPreprocessor
from mmengine.model.weight_init import update_init_info
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop
from torch import Tensor, nn


def checkpoint_of(runner) -> Optional[str]:
    """The checkpoint that a runner starts from or resumes, or None. Both."""
    return runner._load_from


def is_resumed(runner) -> bool:
    """Whether a runner continues another run. Both."""
    return bool(runner._resume)


def is_training(runner) -> bool:
    """Whether a runner's ``train`` was called, which builds its loop first. Both."""
    return isinstance(runner._train_loop, BaseLoop)


def batches_of_update(wrapper: OptimWrapper) -> int:
    """Number of batches that an optimiser wrapper accumulates per update. Both."""
    return wrapper._accumulative_counts


def count_in_micro_batches(
    wrapper: OptimWrapper, micro_batches: int, updates: int, max_updates: int
) -> None:
    """Let an optimiser wrapper accumulate several batches per update. Both.

    Args:
        wrapper (OptimWrapper): The wrapper.
        micro_batches (int): Number of batches per update.
        updates (int): Number of updates that were made.
        max_updates (int): Number of updates of the whole run.
    """
    wrapper._accumulative_counts = micro_batches
    # With the model it would warn of BatchNorm, which our loops handle.
    module = nn.Identity()
    wrapper.initialize_count_status(
        module, updates * micro_batches, max_updates * micro_batches
    )


class TrainLoopCounters:
    """Public names for the counters of MMEngine's two training loops. Both."""

    _iter: int
    _epoch: int
    _decide_current_val_interval: Callable[[], None]
    dataloader: Any
    dataloader_iterator: Any

    def count_update(self) -> None:
        """Count one more update."""
        self._iter += 1

    def count_epoch(self) -> None:
        """Count one more epoch."""
        self._epoch += 1

    def update_val_interval(self) -> None:
        """Set the validation interval that ``dynamic_intervals`` gives for now."""
        self._decide_current_val_interval()

    def load_from_pass(self, number: int) -> None:
        """Restart the data loader in a given pass over the data.

        mmengine 0.10.7 has started it already, in the first pass.

        Args:
            number (int): The pass, counted from 0.
        """
        self.dataloader_iterator = type(self.dataloader_iterator)(self.dataloader)
        self.dataloader_iterator._epoch = number


def copy_without_waiting(model: nn.Module) -> None:
    """Let a model's data preprocessor copy pinned memory while the GPU works. Both.

    mmpretrain's and mmseg's preprocessors do not pass the argument ``non_blocking`` on.
    """
    for module in model.modules():
        if isinstance(module, BaseDataPreprocessor):
            module._non_blocking = True


def note_init_info(module: nn.Module, text: str) -> None:
    """Record how a module was initialised, if MMEngine records it. Both."""
    if hasattr(module, '_params_init_info'):
        update_init_info(module, init_info=text)


class CheckpointHookSteps(CheckpointHook):
    """MMEngine's hook, with public methods that subclasses override. Both."""

    def saving(self) -> AbstractContextManager:
        """The context in which a checkpoint is saved."""
        raise NotImplementedError

    def saved_usual(self, runner) -> None:
        """Called after a checkpoint of an epoch or iteration, not of the best model."""

    def publishes(self, path: Optional[str]) -> bool:
        """Whether to publish a file at the end of training."""
        raise NotImplementedError

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        with self.saving():
            super()._save_checkpoint_with_step(runner, step, meta)
        self.saved_usual(runner)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        with self.saving():
            super()._save_best_checkpoint(runner, metrics)

    @master_only
    def _publish_model(self, runner, ckpt_path: Optional[str]) -> None:
        if self.publishes(ckpt_path):
            super()._publish_model(runner, ckpt_path)


@contextmanager
def acting_as(rank: int, world_size: int) -> Iterator[None]:
    """Build samplers for another process than this one. Both.

    Samplers call ``get_dist_info`` when they are built, and have no argument for the
    rank.

    Args:
        rank (int): Rank that the samplers get.
        world_size (int): Number of processes that the samplers get.
    """
    utils: Any = import_module('mmengine.dist.utils')
    own = utils.get_rank, utils.get_world_size
    utils.get_rank = lambda group=None: rank
    utils.get_world_size = lambda group=None: world_size
    try:
        yield
    finally:
        utils.get_rank, utils.get_world_size = own


def lay_out_configs_once() -> None:
    """Make YAPF format the text of a config only once in this process.

    It takes a second or more, and MMEngine does it four times when a run starts, and
    for every checkpoint. mmengine 0.10.7 imports YAPF's function at its top, and the
    fork before every call.
    """
    owner: Any = import_module('mmengine.config.config')
    if not hasattr(owner, 'FormatCode'):
        owner = import_module('yapf.yapflib.yapf_api')
    lay_out = owner.FormatCode
    if hasattr(lay_out, '__wrapped__'):
        return
    known: Dict[str, tuple] = {}

    @functools.wraps(lay_out)
    def format_code(text: str, **options) -> tuple:
        if text not in known:
            known[text] = lay_out(text, **options)
        return known[text]

    owner.FormatCode = format_code


def innermost_build(error: BaseException) -> Optional[Tuple[Any, Dict[str, Any]]]:
    """What MMEngine's registries were building when an error was raised. Both.

    Returns:
        tuple | None: Class or function, and its arguments; None if nothing was built.
    """
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get('__name__') != 'mmengine.registry.build_functions':
            continue
        seen = frame.f_locals
        kind = seen.get('obj_cls') or seen.get('scheduler_cls')
        if kind is not None:
            found = kind, dict(seen['args'])
    return found


def replace_print(module: str, print_: Callable[..., None]) -> None:
    """Replace ``print`` in a module.

    MMEngine's ``logger`` (both) and pycocotools (2.0) print results that nothing else
    returns.

    Args:
        module (str): Name of the module.
        print_ (Callable): Called in place of ``print``.
    """
    setattr(import_module(module), 'print', print_)  # noqa: B010


def has_logger() -> bool:
    """Whether MMEngine has made a logger. Both."""
    return bool(MMLogger._instance_dict)


def classification_losses(head: Any, logits: Tensor, data_samples: list) -> dict:
    """Losses of an mmpretrain head (1.2.0, 1.3.6) for given logits."""
    return head._get_loss(logits, data_samples)


def loads_label_maps(kind: Any) -> bool:
    """Whether a transform's class reads label maps as mmseg's LoadAnnotations does.

    mmseg 1.2.2 and 1.4.2.
    """
    from mmseg.datasets.transforms import LoadAnnotations

    return getattr(kind, '_load_seg_map', None) is LoadAnnotations._load_seg_map


def load_again_as_list(dataset: Any) -> None:
    """Let a data set of MMEngine load its annotations anew, not serialised. Both."""
    dataset._fully_initialized = dataset.serialize_data = False


def whole_dataset(dataset: Any) -> Any:
    """The data set of a loader, also if ``num_batch_per_epoch`` takes a part. Both."""
    return vars(dataset).get('_dataset', dataset)


def predicts_as(part: Any, base: type) -> bool:
    """Whether a model or a head predicts by the methods that a class has, or inherits.

    mmdet 3.3.0 and 3.5.1, mmseg 1.2.2 and 1.4.2, mmpretrain 1.2.0 and 1.3.6.

    Args:
        part (Any): A detector, segmentor or classifier, or a head.
        base (type): The class.
    """
    kind = type(part)
    return issubclass(kind, base) and all(
        getattr(kind, name, None) is getattr(base, name, None) for name in _PREDICTION
    )


#: Methods from outputs to predictions.
_PREDICTION = (
    'predict',
    'predict_by_feat',
    '_predict_by_feat_single',
    # Detectors
    '_bbox_post_process',
    'predict_bbox',
    '_bbox_forward',
    '_refine_roi',
    'regress_by_class',
    'predict_mask',
    '_mask_forward',
    # Segmentors
    'inference',
    'whole_inference',
    'encode_decode',
    'postprocess_result',
    # Classifiers
    '_get_predictions',
)
