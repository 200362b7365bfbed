# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Imported by a run's config: its model is built in float64.

Rounding that differs with the batches then decides no ReLU.
"""

import torch

torch.set_default_dtype(torch.float64)
