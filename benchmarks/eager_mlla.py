# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA by PyTorch's operators: what the fused kernels are raced against."""

import os
from typing import Tuple

from torch import Tensor

from mlla_mm.models import MLLA
from mlla_mm.ops.tracing import is_graph

_VARIABLE = 'MLLA_OPS'


class EagerMLLA(MLLA):
    """MLLA by the ops of ``mlla_mm.ops.eager`` alone, whatever the device's default.

    The forward pass sets the environment variable ``MLLA_OPS`` to 'eager', and leaves
    it as it was; the environment is that of all threads. With ``with_cp`` the blocks
    are recomputed after that, by the default. A graph that is being recorded has the
    plain definitions, like that of :class:`MLLA`.

    Arguments, parameters and their names are those of :class:`MLLA`, and so are the
    outputs. It is not in the registry.
    """

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of the stages in ``out_indices``, see :meth:`MLLA.forward`."""
        if is_graph():  # which has no environment
            return super().forward(x)
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = 'eager'
        try:
            return super().forward(x)
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
