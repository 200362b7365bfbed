# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What parameter schedulers have set after a part of a run."""

import copy
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

# What MMEngine's schedulers keep for each parameter group.
BY_GROUP = {'base_values', '_last_value', 'min_values'}


def replay(
    schedulers: Sequence[Any],
    groups: Sequence[Dict[str, Any]],
    epochs: int,
    iterations: int,
    epoch_length: int,
) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Step schedulers as a run does up to some iteration.

    Most of MMEngine's schedulers compute a value from the one before, so every step is
    made, in the order of MMEngine's ``ParamSchedulerHook``. Groups with the same values
    are stepped as one.

    Args:
        schedulers (Sequence): Schedulers that are just built. They are not changed.
        groups (Sequence[dict]): ``param_groups`` of their optimiser wrapper. They are
            not changed.
        epochs (int): How many epochs are over.
        iterations (int): How many iterations are over.
        epoch_length (int): Iterations of an epoch.

    Returns:
        tuple: The groups without their parameters, and the schedulers' ``state_dict``.
    """
    own = [without_parameters(group) for group in groups]
    kinds = _kinds(schedulers, own)
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    stepped = SimpleNamespace(
        param_groups=[dict(own[i]) for i in first.values()], step=None
    )
    place = {kind: i for i, kind in enumerate(first)}
    copies = [_copy(x, stepped, first.values()) for x in schedulers]
    with warnings.catch_warnings():
        # Of steps that no step of the optimiser comes before.
        warnings.simplefilter('ignore')
        _step(copies, epochs, iterations, epoch_length)
    states = []
    for scheduler, original in zip(copies, schedulers):
        state = dict(scheduler.state_dict(), verbose=original.verbose)
        for key in BY_GROUP & set(state):
            state[key] = [state[key][place[kind]] for kind in kinds]
        states.append(state)
    return [dict(stepped.param_groups[place[kind]]) for kind in kinds], states


def without_parameters(group: Dict[str, Any]) -> Dict[str, Any]:
    """A copy of a parameter group that has its hyperparameters alone."""
    return {k: v for k, v in group.items() if k not in ('params', 'param_names')}


def plain(value: Any) -> Any:
    """Python's numbers for tensors and NumPy's values; other values as they are."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, 'tolist') else value


def _kinds(schedulers: Sequence[Any], groups: List[dict]) -> List[Any]:
    """Equal values for groups that schedulers treat alike."""
    lists = [
        {k for k, v in vars(x).items() if isinstance(v, (list, tuple))}
        for x in schedulers
    ]
    for scheduler, names in zip(schedulers, lists):
        if any(len(vars(scheduler)[k]) == len(groups) for k in names - BY_GROUP):
            # It may be a list of values by group, of a scheduler that is not known.
            return list(range(len(groups)))
    by_group = [vars(x)[k] for x in schedulers for k in sorted(BY_GROUP & set(vars(x)))]
    # Python writes a float such that it can be read again without loss.
    values = [sorted((k, plain(v)) for k, v in group.items()) for group in groups]
    return [repr((x, [y[i] for y in by_group])) for i, x in enumerate(values)]


def _copy(scheduler: Any, optimizer: Any, chosen: Any) -> Any:
    """A copy of a scheduler that sets some of the groups alone."""
    state = copy.deepcopy(scheduler.state_dict())
    for key in BY_GROUP & set(state):
        state[key] = [state[key][i] for i in chosen]
    copied = copy.copy(scheduler)
    copied.load_state_dict(dict(state, verbose=False))
    copied.optimizer = optimizer
    return copied


def _step(
    schedulers: List[Any], epochs: int, iterations: int, epoch_length: int
) -> None:
    by_epoch = [x for x in schedulers if x.by_epoch]
    by_iteration = [x for x in schedulers if not x.by_epoch]
    done = 0
    for epoch in range(epochs + 1):
        # The last epoch is not over.
        end = iterations if epoch == epochs else (epoch + 1) * epoch_length
        if by_iteration:
            for _ in range(done, min(end, iterations)):
                for scheduler in by_iteration:
                    scheduler.step()
        done = min(end, iterations)
        if epoch < epochs:
            for scheduler in by_epoch:
                scheduler.step()
