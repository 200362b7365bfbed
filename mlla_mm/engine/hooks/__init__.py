# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .mesa import MESAHook, UseEMAWeightsHook
from .sync_buffers import SyncBuffersBeforeSaveHook

__all__ = ['MESAHook', 'SyncBuffersBeforeSaveHook', 'UseEMAWeightsHook']
