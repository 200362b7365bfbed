# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Whether the state of an optimiser in a checkpoint fits the optimiser of a config."""

import copy
import inspect
import math
from collections import defaultdict
from numbers import Real
from typing import Any, Dict, NoReturn, Optional, Sequence, Set

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoints.reader import CheckpointError
from ..utils.text import printable
from .resume import is_count
from .schedule_replay import plain

State = Dict[str, Any]

# What PyTorch's versions have or have not for the same kind of optimiser, and what
# constructors of optimisers add.
_NOT_OF_KIND = {
    *('foreach', 'fused', 'capturable', 'differentiable', 'maximize'),
    *('decoupled_weight_decay', 'params', 'param_names', 'lr_scale', 'group_name'),
}
_DAMAGED = "its optimiser's state is not as a training saves it"
# Of a parameter that an optimiser is tried with. No value of its state has this shape
# by chance.
_PROBE_SHAPE = (2, 3)


def require_fit(wrapper: OptimWrapper, saved: Any, source: str) -> None:
    """Refuse a state of other parameters, of another kind of optimiser, or damaged.

    Args:
        wrapper (OptimWrapper): The wrapper of the config's optimiser.
        saved (Any): Its state in the checkpoint.
        source (str): The checkpoint, for the message.

    Raises:
        CheckpointError: If the optimiser cannot go on from the state.
    """
    groups = saved.get('param_groups') if isinstance(saved, dict) else None
    if not (
        isinstance(groups, list)
        and all(
            isinstance(x, dict) and isinstance(x.get('params'), list) for x in groups
        )
        and isinstance(saved.get('state'), dict)
    ):
        refuse(source, _DAMAGED, '')
    own = wrapper.optimizer.param_groups
    sizes = [[len(x['params']) for x in y] for y in (own, groups)]
    if sizes[0] != sizes[1]:
        here, there = (f'{sum(x)} parameters in {len(x)} groups' for x in sizes)
        refuse(
            source,
            f'the optimiser of the config has {here}, and that of the checkpoint '
            f'{there}',
            'the model with its frozen layers and optim_wrapper.paramwise_cfg',
        )
    if own:
        _require_kind(wrapper.optimizer, groups, source)
    _require_state(wrapper.optimizer, saved, source)


def require_numbers(own: State, saved: State, names: Set[str], source: str) -> None:
    """Refuse a group whose values, that schedulers set, are no numbers from 0 on.

    Args:
        own (dict): Parameter group of the config's optimiser.
        saved (dict): The same group in the checkpoint.
        names (set[str]): The hyperparameters that schedulers set.
        source (str): The checkpoint, for the message.

    Raises:
        CheckpointError: Names the first such value.
    """
    # Schedulers of the momentum set the first of the betas.
    for name in names | ({'betas'} if 'momentum' in names else set()):
        if name in own and not _is_like_setting(saved.get(name), own[name]):
            refuse(
                source, f'{name} of its optimiser is {printable(saved.get(name))}', ''
            )


def refuse(source: str, reason: str, what: str = 'optim_wrapper') -> NoReturn:
    """Raise the error of a checkpoint that cannot be resumed.

    Args:
        source (str): The checkpoint.
        reason (str): Why.
        what (str): Which part of the config can be set back; '' if none can. Defaults
            to 'optim_wrapper'.

    Raises:
        CheckpointError: Always.
    """
    set_back = f'Set {what} back, or start' if what else 'Start'
    raise CheckpointError(
        f'{printable(source)} cannot be resumed: {reason}. {set_back} from its weights '
        'with load_from instead.'
    )


def arguments_of(optimizer: Any) -> Set[str]:
    """The hyperparameters that a config can give to an optimiser."""
    # A ZeroRedundancyOptimizer hands them to another one.
    wrapped = getattr(optimizer, 'optim', None)
    if isinstance(wrapped, Optimizer):
        return arguments_of(wrapped)
    return {
        name
        for kind in type(optimizer).__mro__
        if issubclass(kind, Optimizer)
        for name in inspect.signature(kind.__init__).parameters
    } - {'self', 'params', 'defaults'}


def is_scheduled(name: str, group: State) -> bool:
    """Whether schedulers add such a value to a parameter group."""
    # That of the momentum adds it to optimisers with betas.
    of_betas = name == 'momentum' and 'betas' in group
    return name.startswith(('initial_', 'max_', 'min_')) or of_betas


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or a tensor of one."""
    return is_real(value) and math.isfinite(value)


def is_real(value: Any) -> bool:
    """Whether a value is a number that fits a float. It may be infinite."""
    value = plain(value)
    is_kind = isinstance(value, Real) and not isinstance(value, bool)
    return is_kind and (not isinstance(value, int) or abs(value) < 2**63)


def _is_like_setting(value: Any, own: Any) -> bool:
    """Whether a value is a number from 0 on, or as many of them as another one."""
    if not isinstance(own, (list, tuple)):
        return is_number(value) and plain(value) >= 0
    return (
        isinstance(value, (list, tuple))
        and len(value) == len(own)
        and all(_is_like_setting(x, 0) for x in value)
    )


def _require_kind(optimizer: Any, groups: Sequence[State], source: str) -> None:
    """Compare the names of the hyperparameters."""
    names, saved_names = (
        set.intersection(
            *(
                {k for k in x if k not in _NOT_OF_KIND and not is_scheduled(k, x)}
                for x in one
            )
        )
        for one in (optimizer.param_groups, groups)
    )
    lacking = sorted((names & arguments_of(optimizer)) - saved_names)
    if not lacking and _is_pytorchs(optimizer):
        lacking = sorted(saved_names - names)
    if lacking:
        whose = 'checkpoint' if set(lacking) <= names else 'config'
        refuse(
            source,
            "it is of another kind of optimiser than the config's "
            f'{type(optimizer).__name__}: that of the {whose} has no '
            f'{", ".join(map(printable, lacking))}',
            'optim_wrapper.optimizer',
        )


def _require_state(optimizer: Any, saved: State, source: str) -> None:
    """Compare what the optimiser keeps for each parameter."""
    places = [x for group in saved['param_groups'] for x in group['params']]
    if not all(map(is_count, places)) or len({*places}) < len(places):
        refuse(source, _DAMAGED, '')
    parameters = [x for group in optimizer.param_groups for x in group['params']]
    kept = _kept_by(optimizer)
    for place, parameter in zip(places, parameters):
        state = saved['state'].get(place, {})
        if not isinstance(state, dict):
            refuse(source, _DAMAGED, '')
        lacking = sorted(kept.keys() - state.keys()) if state else []
        if lacking:
            refuse(
                source,
                f"its optimiser's state has no {', '.join(lacking)}, which "
                f'{type(optimizer).__name__} needs',
                'optim_wrapper.optimizer',
            )
        for name in kept.keys() & state.keys():
            if not _is_like(state[name], kept[name], parameter):
                refuse(source, f'{_DAMAGED}, such as {name}', '')


def _is_like(value: Any, probed: Any, parameter: Tensor) -> bool:
    """Whether a value is of the kind that an optimiser keeps for a parameter."""
    shape: Optional[Sequence[int]] = getattr(probed, 'shape', ())
    if shape == _PROBE_SHAPE:
        # None before the first momentum of SGD.
        return value is None or getattr(value, 'shape', None) == parameter.shape
    if shape == ():
        # Steps, and products and rates that are made of them.
        return not isinstance(probed, (Tensor, Real)) or _is_like_setting(value, 0)
    return isinstance(value, Tensor)


def _is_pytorchs(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith('torch.optim')


def _kept_by(optimizer: Any) -> State:
    """What an optimiser of PyTorch keeps for a parameter of 2x3; else empty."""
    if not _is_pytorchs(optimizer) or not optimizer.param_groups:
        return {}
    parameter = nn.Parameter(torch.zeros(_PROBE_SHAPE))
    parameter.grad = torch.zeros(_PROBE_SHAPE)
    probe = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [dict(optimizer.param_groups[0], params=[parameter])]
    probe.step()
    return dict(probe.state[parameter])
