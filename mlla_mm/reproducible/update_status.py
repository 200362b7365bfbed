# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the processes have to know of an update, read from the device at once."""

from collections.abc import Mapping
from typing import Any, Dict, NamedTuple, Optional

import torch
from mmengine.dist import all_reduce
from torch import Tensor

from ..compat.pytorch import loss_scale


class UpdateStatus(NamedTuple):
    """What is known after an update.

    Attributes:
        logs (dict[str, Tensor]): The model's logs of this process, on the CPU.
        any_invalid (bool): Whether a loss of any process is not finite.
        any_asks_to_stop (bool): Whether any process asks to stop.
        loss_scale (float | None): Lowest loss scale of all processes, for the next
            update. None without one.
    """

    logs: Dict[str, Tensor]
    any_invalid: bool
    any_asks_to_stop: bool
    loss_scale: Optional[float]


def read_update(
    logs: Mapping[str, Any], optim_wrapper: Any, asks_to_stop: bool = False
) -> UpdateStatus:
    """Read an update's logs, and exchange what all processes have to know.

    Every process calls it after its update. It waits for the device once, and reduces
    one tensor over the processes.

    Args:
        logs (Mapping[str, Tensor | float]): What the model's ``train_step`` returned.
            The values whose name has 'loss' in it are losses.
        optim_wrapper (OptimWrapper): The wrapper that made the update.
        asks_to_stop (bool): Whether this process asks all to stop. Defaults to False.

    Raises:
        ValueError: If a value is not one number.
    """
    names = sorted(logs, key=lambda name: 'loss' not in name)
    numbers = [_as_number(name, logs[name]) for name in names]
    # Numbers in Python are on the CPU, and a model may be on several devices.
    device = next((x.device for x in numbers if x.device.type != 'cpu'), None)
    numbers = [x.to(device, non_blocking=True) for x in numbers]
    values = torch.stack(numbers) if numbers else torch.zeros(0)
    losses = values[: sum('loss' in name for name in names)]
    scale = loss_scale(optim_wrapper)
    # new_full writes on the device. torch.tensor would wait for it.
    shared = [
        ~losses.isfinite().all(),
        losses.new_full((), asks_to_stop),
        losses.new_full((), 0) if scale is None else -scale.to(values.device),
    ]
    largest = torch.stack([x.to(torch.float32) for x in shared])
    all_reduce(largest, op='max')
    *read, any_invalid, any_asks, negated = torch.cat([values, largest]).cpu()
    by_name = dict(zip(names, read))
    return UpdateStatus(
        {name: by_name[name] for name in logs},
        bool(any_invalid),
        bool(any_asks),
        None if scale is None else -negated.item(),
    )


def _as_number(name: str, value: Any) -> Tensor:
    """A log of the model as a tensor of shape ()."""
    number = torch.as_tensor(value).detach()
    if number.numel() != 1:
        raise ValueError(
            f"The model's train_step returned {name!r} of shape {tuple(number.shape)}, "
            'but a log is one number: return its mean, or leave it out.'
        )
    return number.reshape(())
