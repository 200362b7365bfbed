# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from .warmup_cosine import WarmupCosineLR

__all__ = ['WarmupCosineLR']
