# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from . import hooks, schedulers

__all__ = ['hooks', 'schedulers']
