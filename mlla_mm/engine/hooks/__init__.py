# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .check_weights import CheckWeightsHook
from .checkpoint import WholeCheckpointHook
from .compile_backbone import CompileBackboneHook
from .fuse_conv_bn import FuseConvBNHook
from .invalid_loss import DivergedError, StopOnInvalidLossHook
from .logger import MainProcessLoggerHook
from .mesa import MESAHook, UseEMAWeightsHook
from .no_hook import NoHook
from .record_recipe import RecordRecipeHook
from .record_run import RecordRunHook
from .sync_buffers import SyncBuffersBeforeSaveHook
from .zero import SaveZeroOptimizerHook

__all__ = [
    'CheckWeightsHook',
    'CompileBackboneHook',
    'DivergedError',
    'FuseConvBNHook',
    'MESAHook',
    'MainProcessLoggerHook',
    'NoHook',
    'RecordRecipeHook',
    'RecordRunHook',
    'SaveZeroOptimizerHook',
    'StopOnInvalidLossHook',
    'SyncBuffersBeforeSaveHook',
    'UseEMAWeightsHook',
    'WholeCheckpointHook',
]
