# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA by PyTorch's operators, to be raced against the fused kernels."""

import os
from typing import Tuple

from torch import Tensor

from mlla_mm.models import MLLA
from mlla_mm.ops.tracing import is_graph

_VARIABLE = 'MLLA_OPS'


class EagerMLLA(MLLA):
    """MLLA that runs the ops of ``mlla_mm.ops.eager`` on any device.

    The forward pass sets the environment variable ``MLLA_OPS`` to 'eager' for the whole
    process, and restores it at its end. With ``with_cp`` blocks are recomputed later,
    in the backward pass, by the device's default ops. A graph that is being recorded
    gets the plain definitions, as for :class:`MLLA`.

    Arguments, parameters, their names and the outputs are those of :class:`MLLA`. The
    class is not in the registry.
    """

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of the stages in ``out_indices``, see :meth:`MLLA.forward`."""
        if is_graph():  # a graph cannot hold environment variables
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
