# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import math
from typing import List

from mmengine.optim import _ParamScheduler
from mmengine.optim.scheduler.param_scheduler import INF, OptimizerType
from mmengine.registry import PARAM_SCHEDULERS

from ..arguments import ArgumentError


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    r"""Linear warm-up, then a cosine that began together with it.

    With the optimiser's own rate :math:`b`, :math:`w = b \cdot` ``start_ratio``,
    :math:`m = b \cdot` ``min_ratio``, :math:`T` = ``end - begin`` and W warm-up steps

    .. math::
        lr(t) = w + (b - w) t / W \quad (t < W), \qquad
        lr(t) = m + (b - m) (1 + \cos(\pi t / T)) / 2 \quad (t \ge W)

    so the rate drops at the end of the warm-up. Iteration 0 is trained with lr(0), and
    iteration k >= 1 with lr(k - 1). This is the rate of timm's scheduler if it is
    stepped after each iteration with the iteration's number. MMEngine's LinearLR and
    CosineAnnealingLR step one iteration earlier and start the cosine after the warm-up.

    Args:
        optimizer (Optimizer | BaseOptimWrapper): The optimiser or its wrapper.
        warmup (int): Number of warm-up steps; epochs with ``by_epoch``.
        start_ratio (float): Rate at the start of the warm-up over the optimiser's.
            Defaults to 1e-3.
        min_ratio (float): Rate at the end of the cosine over the optimiser's.
            Defaults to 1e-2.
        begin (int): Step at which the schedule starts. Defaults to 0.
        end (int): Step at which it ends. MMEngine's runner sets it to the length of
            the training if the config does not. Defaults to no end.
        last_step (int): Index of the last step; -1 is before the first. Defaults to -1.
        by_epoch (bool): Whether steps are epochs. ``convert_to_iter_based=True`` in a
            config converts them to iterations. Defaults to True.
        verbose (bool): Whether to print every rate. Defaults to False.

    Raises:
        ArgumentError: If the warm-up is negative, or longer than the schedule.
    """

    def __init__(
        self,
        optimizer: OptimizerType,
        warmup: int,
        start_ratio: float = 1e-3,
        min_ratio: float = 1e-2,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        if not 0 <= warmup <= end - begin:
            raise ArgumentError(
                f'warmup must lie between 0 and the {end - begin} steps of the '
                f'schedule, got {warmup} steps. Set warmup and end of param_scheduler.'
            )
        self.warmup = warmup
        self.start_ratio = start_ratio
        self.min_ratio = min_ratio
        super().__init__(optimizer, 'lr', begin, end, last_step, by_epoch, verbose)

    @classmethod
    def build_iter_from_epoch(
        cls,
        optimizer: OptimizerType,
        warmup: int,
        begin: int = 0,
        end: int = INF,
        by_epoch: bool = True,
        *,
        epoch_length: int,
        **kwargs,
    ) -> 'WarmupCosineLR':
        """Build a schedule by iterations from one by epochs.

        Args:
            epoch_length (int): Number of iterations of an epoch. The other arguments
                are those of the class, counted in epochs.
        """
        return cls(
            optimizer,
            warmup=warmup * epoch_length,
            begin=begin * epoch_length,
            end=end if end == INF else end * epoch_length,
            by_epoch=False,
            **kwargs,
        )

    def _get_value(self) -> List[float]:
        t = max(self.last_step - 1, 0)
        if t < self.warmup:
            factor = self.start_ratio + t / self.warmup * (1 - self.start_ratio)
        else:
            cosine = (1 + math.cos(math.pi * t / (self.end - self.begin))) / 2
            factor = self.min_ratio + (1 - self.min_ratio) * cosine
        return [base * factor for base in self.base_values]
