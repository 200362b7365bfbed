# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .checkpoint import WholeCheckpointHook
from .compile_backbone import CompileBackboneHook
from .invalid_loss import DivergedError, StopOnInvalidLossHook
from .mesa import MESAHook
from .no_hook import NoHook
from .processes import (
    MainProcessLoggerHook,
    SaveZeroOptimizerHook,
    SyncBuffersBeforeSaveHook,
)
from .records import RecordRecipeHook, RecordRunHook
from .weights import (
    CheckWeightsHook,
    FreshHeadsHook,
    FuseConvBNHook,
    UseEMAWeightsHook,
)

__all__ = [
    'CheckWeightsHook',
    'CompileBackboneHook',
    'DivergedError',
    'FreshHeadsHook',
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
