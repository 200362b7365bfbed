# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA by one implementation of its ops, to be raced against the device's default."""

import os
from typing import Tuple

from torch import Tensor

from mlla_mm.models import MLLA
from mlla_mm.ops.tracing import is_graph

_VARIABLE = 'MLLA_OPS'


class ForcedMLLA(MLLA):
    """MLLA whose forward pass sets the environment variable ``MLLA_OPS``.

    It is set for the whole process, and restored at the end of the forward pass. With
    ``with_cp`` blocks are recomputed later, in the backward pass, by the device's
    default ops. A graph that is being recorded gets what :class:`MLLA` gets.

    Arguments, parameters, their names and the outputs are those of :class:`MLLA`. The
    class is not in the registry.

    Attributes:
        ops (str): The value of the variable.
    """

    ops: str

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of the stages in ``out_indices``, see :meth:`MLLA.forward`."""
        if is_graph():  # a graph cannot hold environment variables
            return super().forward(x)
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = self.ops
        try:
            return super().forward(x)
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before


class EagerMLLA(ForcedMLLA):
    """MLLA that runs the ops of ``mlla_mm.ops.eager`` on any device."""

    ops = 'eager'


class FusedMLLA(ForcedMLLA):
    """MLLA that takes all of Triton's kernels, also those that are no default.

    Its forward pass raises a ValueError on a device without them.
    """

    ops = 'fused'
