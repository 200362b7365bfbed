# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A resumed run has the settings of its config.

MMEngine puts the optimiser's and the schedulers' state of the checkpoint over what the
config says. Here the checkpoint is changed before MMEngine loads it: what the run has
learnt stays, and what the config sets is the config's.
"""

from itertools import islice
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from ..checkpoints.reader import CheckpointError
from ..compat.openmmlab import batches_of_update, is_resumed
from ..utils.text import printable
from .optimizer_fit import (
    arguments_of,
    is_number,
    is_real,
    is_scheduled,
    refuse,
    require_fit,
    require_numbers,
)
from .resume import SETTINGS_KEY, is_count, source_of
from .schedule_replay import BY_GROUP, plain, replay, without_parameters

State = Dict[str, Any]
Changes = Dict[str, Tuple[Any, Any]]

# How far a scheduler has come.
_PROGRESS = {'last_step', '_global_step', '_last_value'}
# What ReduceOnPlateau has seen of the metrics.
_SEEN = {'best', 'num_bad_epochs', 'cooldown_counter'}
_NAMES = {'lr': 'learning rate', 'initial_lr': 'learning rate'}
_WAY_OUT = 'or start from its weights with load_from instead'


class Place(NamedTuple):
    """Where a run goes on.

    Attributes:
        epoch (int): Epochs that are over.
        iter (int): Iterations that are over.
        epoch_length (int): Iterations of an epoch.
        moved (bool): Whether the checkpoint has another number of iterations.
    """

    epoch: int
    iter: int
    epoch_length: int
    moved: bool


@HOOKS.register_module()
class ResumedSettingsHook(Hook):
    """Give a resumed run the settings of its config, not those of the checkpoint.

    The optimiser's moments stay the checkpoint's. If the config has other
    hyperparameters, another schedule or another length, or if epochs have another
    number of iterations, learning rate and schedule become those that an uninterrupted
    run of the config would have there. Each change is logged with the iteration from
    which on it holds. If nothing differs, the checkpoint is not changed.

    The hook changes nothing in runners of MMEngine's strategies (FSDP, DeepSpeed), nor
    with training loops that are not derived from MMEngine's two.

    Raises:
        CheckpointError: If the run cannot go on with the settings of the config.
    """

    # After the hooks that check the checkpoint.
    priority = 'LOWEST'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        loops = (EpochBasedTrainLoop, IterBasedTrainLoop)
        if not (
            is_resumed(runner)
            and isinstance(runner, Runner)
            and isinstance(runner.optim_wrapper, OptimWrapper)
            and isinstance(runner.train_loop, loops)
        ):
            return
        source = source_of(runner)
        place, lines = settle_length(runner, checkpoint, source)
        lines += settle_optimizers(runner, checkpoint, place, source)
        for line in lines:
            print_log(f'From iteration {place.iter + 1} on: {line}.', logger='current')

    def before_train(self, runner) -> None:
        total = total_batch(runner)
        if total is not None:
            by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
            settings = dict(by_epoch=by_epoch, total_batch=total)
            runner.message_hub.update_info(SETTINGS_KEY, settings)


def total_batch(runner) -> Optional[int]:
    """Images of an optimiser update; None if the data loader does not tell."""
    loader = runner.train_dataloader
    size = getattr(loader.batch_sampler, 'batch_size', None)
    if not is_count(size):
        return None
    wrappers = _by_name(runner.optim_wrapper).values()
    # When our loop runs, the wrapper counts its micro-batches.
    micro_batches = getattr(runner.train_loop, 'micro_batches', 1)
    accumulated = max(micro_batches, *map(batches_of_update, wrappers))
    return runner.world_size * size * accumulated


def settle_length(runner, checkpoint: dict, source: str) -> Tuple[Place, List[str]]:
    """Find where a run goes on, and what of its length and batches has changed.

    Args:
        runner (Runner): A runner with a built training loop.
        checkpoint (dict): The checkpoint. If epochs have another number of iterations,
            its number of iterations becomes that of the same epoch in this run.
        source (str): The file, for messages.

    Returns:
        tuple: The place, and a text for each change.

    Raises:
        CheckpointError: If the checkpoint has trained longer than the config says, or
            counts iterations where the config counts epochs, or the reverse.
    """
    loop, meta = runner.train_loop, checkpoint['meta']
    state = checkpoint['message_hub']['runtime_info']
    saved = state.get(SETTINGS_KEY, {})
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    if saved.get('by_epoch', by_epoch) != by_epoch:
        raise CheckpointError(
            f'{printable(source)} cannot be resumed: its training counts '
            f'{_unit(not by_epoch)}, and train_cfg of the config {_unit(by_epoch)}. '
            f'Give train_cfg max_{"iters" if by_epoch else "epochs"}, {_WAY_OUT}.'
        )
    lines = []
    total, old_total = total_batch(runner), saved.get('total_batch', 0)
    if total and old_total and total != old_total:
        lines.append(f'total batch {total} instead of {old_total}')
    key = 'max_epochs' if by_epoch else 'max_iters'
    length, old_length = getattr(runner, key), state.get(key)
    if is_count(old_length) and old_length != length:
        lines.append(f'train_cfg.{key} {length} instead of {old_length}')
    if not by_epoch:
        _require_left(meta['iter'], length, 'max_iters', source)
        return Place(meta['epoch'], meta['iter'], length, False), lines

    updates, begun = len(loop.dataloader), state.get('epoch_begun') or {}
    is_within = begun.get('epoch') == meta['epoch'] and meta['iter'] > begun['iter']
    _require_left(meta['epoch'] + is_within, length, 'max_epochs', source)
    old_updates = begun.get('updates') or _updates_per_epoch(state)
    moved = bool(old_updates) and updates not in (0, old_updates)
    if moved:
        meta['iter'] = meta['epoch'] * updates
        for part in checkpoint['message_hub'].values():
            part.pop('epoch_begun', None)
        again = ', which begins anew' if is_within else ''
        lines.append(
            f'{updates} iterations an epoch instead of {old_updates}, counted as if '
            f'all epochs had had as many. This is epoch {meta["epoch"] + 1}{again}'
        )
    return Place(meta['epoch'], meta['iter'], updates, moved), lines


def settle_optimizers(runner, checkpoint: dict, place: Place, source: str) -> List[str]:
    """Put the config's hyperparameters and schedules into a checkpoint.

    Args:
        runner (Runner): A runner with built optimisers and schedulers, not yet stepped.
        checkpoint (dict): The checkpoint; ``optimizer`` and ``param_schedulers`` are
            changed if the config differs.
        place (Place): Where the run goes on.
        source (str): The file, for messages.

    Returns:
        list[str]: A text for each change.

    Raises:
        CheckpointError: If the optimiser's state does not fit, or if a change cannot be
            applied.
    """
    is_single = not isinstance(runner.optim_wrapper, OptimWrapperDict)

    def by_name(value: Any) -> Dict[str, Any]:
        if is_single:
            return {'': value}
        return value if isinstance(value, dict) else {}

    wrappers = _by_name(runner.optim_wrapper)
    schedulers = by_name(runner.param_schedulers)
    states = by_name(checkpoint.get('param_schedulers'))
    lines = []
    if 'optimizer' in checkpoint:
        optimizers = by_name(checkpoint['optimizer'])
    else:
        optimizers = {name: _fresh_state(x) for name, x in wrappers.items()}
        lines.append('moments start at zero, as the checkpoint has none')
        # Nor does it tell the rates that its schedulers go on from.
        place = place._replace(moved=True)
    if optimizers.keys() != wrappers.keys():
        refuse(source, f'it has not the optimisers {", ".join(wrappers)}')
    for name, wrapper in wrappers.items():
        optimizer = _Optimizer(
            wrapper,
            schedulers.get(name) or [],
            optimizers[name],
            states.get(name) or [],
            source,
        )
        found = optimizer.settle(place)
        lines += found if is_single else [f'{name}: {line}' for line in found]
        states[name] = optimizer.states
    checkpoint['optimizer'] = optimizers[''] if is_single else optimizers
    if runner.param_schedulers is not None:
        checkpoint['param_schedulers'] = states[''] if is_single else states
    return lines


class _Optimizer:
    """An optimiser of the config beside its state in the checkpoint.

    Args:
        wrapper (OptimWrapper): The config's, not yet stepped.
        schedulers (list): The config's, not yet stepped.
        saved (dict): State of the wrapper in the checkpoint; changed in place.
        states (list[dict]): States of the schedulers in the checkpoint.
        source (str): The file, for messages.

    Attributes:
        states (list[dict]): After :meth:`settle`, what the schedulers are to load.
    """

    def __init__(
        self,
        wrapper: OptimWrapper,
        schedulers: List[Any],
        saved: State,
        states: List[State],
        source: str,
    ) -> None:
        require_fit(wrapper, saved, source)
        self.wrapper, self.schedulers = wrapper, schedulers
        self.saved, self.source = saved, source
        is_list = isinstance(states, list) and all(isinstance(x, dict) for x in states)
        self.states = states if is_list else []
        if not all(map(_is_sound, self.states)):
            refuse(source, "its schedulers' state is not as a training saves it", '')
        self._arguments = arguments_of(wrapper.optimizer)
        self._own = [without_parameters(group) for group in wrapper.param_groups]
        self._old = list(saved['param_groups'])
        base = wrapper.base_param_settings
        # The rates before the factors of paramwise_cfg, which only MMEngine has.
        saved_base = saved.pop('base_param_settings', None)
        if base is not None:
            saved_base = saved_base if isinstance(saved_base, dict) else {}
            saved_base = {**base, **saved_base}
            saved['base_param_settings'] = saved_base
            self._old.append(saved_base)

    def settle(self, place: Place) -> List[str]:
        """Change the state to that of the config; returns a text for each change."""
        scheduled = self._scheduled()
        for own, old in zip(self._own, self._old):
            require_numbers(own, old, scheduled, self.source)
        changes = [
            {
                key: values
                for key, values in _changes(
                    _fixed(own, scheduled), _fixed(old, scheduled)
                ).items()
                # Some optimisers count in their groups.
                if key in self._arguments or is_scheduled(key, own)
            }
            for own, old in zip(self._own, self._old)
        ]
        starts = {
            f'{x}_{name}' for x in ('initial', 'max', 'min') for name in scheduled
        }
        starts_elsewhere = place.moved or any(starts & set(x) for x in changes)
        lines = [
            *_settle_precision(self.wrapper, self.saved),
            *self._describe_values(changes),
            *_describe_schedules(self.schedulers, self.states),
        ]
        everyone = [x.state_dict() for x in self.schedulers] + self.states
        if any(map(_reads_metrics, everyone)):
            self._keep_plateaus(starts_elsewhere)
        elif starts_elsewhere or _differ(self.schedulers, self.states):
            return lines + self._replay(place)
        for own, old, changed in zip(self._own, self._old, changes):
            for key in changed:
                value = own[key]
                if key == 'betas' and 'momentum' in scheduled:
                    value = (old[key][0], *value[1:])
                old[key] = value
        return lines

    def _scheduled(self) -> Set[str]:
        """Names of the hyperparameters that a scheduler sets, here or there."""
        names = [x.get('param_name') for x in map(vars, self.schedulers)]
        names += [x.get('param_name') for x in self.states]
        return {x for x in names if isinstance(x, str)}

    def _replay(self, place: Place) -> List[str]:
        """Let the rates be those of an uninterrupted run of the config."""
        groups, states = replay(
            self.schedulers,
            self.wrapper.param_groups,
            place.epoch,
            place.iter,
            place.epoch_length,
        )
        shown = self._of_factor_one()
        before = self._old[shown].get('lr')
        for old, new in zip(self._old, groups):
            kept = {
                k: v
                for k, v in old.items()
                if k not in self._arguments and not is_scheduled(k, old)
            }
            old.clear()
            old.update(new, **kept)
        self.states = states
        now = groups[shown].get('lr')
        if _equal(now, before):
            return []
        return [f'the schedule is at learning rate {_text(now)}, not {_text(before)}']

    def _of_factor_one(self) -> int:
        """The first group with the rate before the factors of paramwise_cfg, or 0."""
        rates = [plain(group.get('lr')) for group in self._own]
        first, last = rates.index(rates[-1]), len(rates) - 1
        return first if first < last else 0

    def _keep_plateaus(self, starts_elsewhere: bool) -> None:
        """Let schedulers that read metrics go on from what they have seen."""
        own = [vars(x) for x in self.schedulers]
        plain_own = [x for x in own if not _reads_metrics(x)]
        plain_old = [x for x in self.states if not _reads_metrics(x)]
        kinds = [list(map(_reads_metrics, x)) for x in (own, self.states)]
        differs = kinds[0] != kinds[1] or any(
            _changes(_fixed_state(x), _fixed_state(y))
            for x, y in zip(plain_own, plain_old)
        )
        if differs or starts_elsewhere:
            refuse(
                self.source,
                'ReduceOnPlateau has set its rate by the metrics so far, so another '
                'learning rate, schedule or number of iterations an epoch cannot be '
                'applied',
                'param_scheduler, optim_wrapper and the batch size',
            )
        for scheduler, state in zip(self.schedulers, self.states):
            if _reads_metrics(state):
                is_same = scheduler.monitor == state.get('monitor')
                is_same &= scheduler.rule == state.get('rule')
                seen = _PROGRESS | (_SEEN if is_same else set())
                fresh = scheduler.state_dict()
                state.update({k: v for k, v in fresh.items() if k not in seen})

    def _describe_values(self, changes: List[Changes]) -> List[str]:
        """A text for each hyperparameter of trained parameters that is another."""
        state = self.saved['state']
        groups = self.wrapper.optimizer.param_groups
        trained = [
            i
            for i, (own, old) in enumerate(zip(groups, self._old))
            if any(x.requires_grad for x in own['params'])
            # Parameters that were frozen have no state.
            and (not state or any(x in state for x in old['params']))
        ]
        lines = []
        for key in dict.fromkeys(k for i in trained for k in changes[i]):
            found = [i for i in trained if key in changes[i]]
            pairs = [tuple(map(plain, changes[i][key])) for i in found]
            # The rate before the factors of paramwise_cfg. It may be none that is in
            # force, as MMEngine's auto_scale_lr does not scale it.
            base = tuple(map(plain, changes[-1].get(key, ())))
            new, old = base if base in pairs else max(pairs, key=pairs.count)
            where = ''
            if len(found) < len(trained):
                where = f' in {len(found)} of {len(trained)} parameter groups'
            name = _NAMES.get(key, key)
            lines.append(f'{name} {_text(new)} instead of {_text(old)}{where}')
        return lines


def _settle_precision(wrapper: OptimWrapper, saved: State) -> List[str]:
    """Keep the loss scale, but not how it changes."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    scale = saved.pop('loss_scaler', None) or None
    if scaler is None or not isinstance(scale, dict):
        if scaler is not None:
            return ['mixed precision instead of float32']
        return [] if scale is None else ['float32 instead of mixed precision']
    own = scaler.state_dict()
    rates = ('growth_factor', 'backoff_factor', 'growth_interval')
    saved['loss_scaler'] = {**scale, **{x: own[x] for x in rates if x in own}}
    return []


def _describe_schedules(schedulers: List[Any], states: List[State]) -> List[str]:
    """A text for what differs between schedules, apart from the rates."""
    names = [type(x).__name__ for x in schedulers]
    fixed = [
        [
            {k: v for k, v in _fixed_state(x).items() if k not in BY_GROUP}
            for x in states_of_one
        ]
        for states_of_one in ([x.state_dict() for x in schedulers], states)
    ]
    if list(map(dict.keys, fixed[0])) != list(map(dict.keys, fixed[1])):
        return [f'schedule {", ".join(names) or "constant"} instead of another one']
    return [
        f'{name}.{key} {_text(new)} instead of {_text(old)}'
        for name, own, saved in zip(names, *fixed)
        for key, (new, old) in _changes(own, saved).items()
    ]


def _differ(schedulers: List[Any], states: List[State]) -> bool:
    own = [_fixed_state(x.state_dict()) for x in schedulers]
    old = [_fixed_state(x) for x in states]
    return len(own) != len(old) or any(
        x.keys() != y.keys() or _changes(x, y) for x, y in zip(own, old)
    )


def _fixed_state(state: State) -> State:
    """What of a scheduler's state does not change in a run."""
    changing = _PROGRESS | (_SEEN if _reads_metrics(state) else set())
    return {k: v for k, v in state.items() if k not in changing and k != 'optimizer'}


def _reads_metrics(state: State) -> bool:
    """Whether a scheduler's state is of MMEngine's ReduceOnPlateau."""
    return 'num_bad_epochs' in state


def _is_sound(state: State) -> bool:
    """Whether what a scheduler has counted and set are numbers."""
    values = state.get('_last_value', [])
    return (
        all(is_count(state.get(x, 0)) for x in ('last_step', '_global_step'))
        and isinstance(values, list)
        and all(map(is_number, values))
        and (not _reads_metrics(state) or all(is_real(state.get(x, 0)) for x in _SEEN))
    )


def _fixed(group: State, scheduled: Set[str]) -> State:
    """The hyperparameters of a group that no scheduler changes."""
    fixed = {k: v for k, v in group.items() if k not in scheduled}
    if 'momentum' in scheduled and isinstance(group.get('betas'), (list, tuple)):
        fixed['betas'] = tuple(group['betas'][1:])
    return fixed


def _changes(new: State, old: State) -> Changes:
    """The values that differ, (new, old), of those that both have."""
    return {k: (new[k], old[k]) for k in new if k in old and not _equal(new[k], old[k])}


def _equal(a: Any, b: Any) -> bool:
    return plain(a) == plain(b)


def _text(value: Any) -> str:
    value = plain(value)
    if isinstance(value, float):
        return f'{value:.6g}'
    if isinstance(value, (list, tuple, dict)):
        return f'({", ".join(map(_text, list(value)[:8]))})'
    return printable(value)


def _by_name(wrapper: OptimWrapper) -> Dict[str, OptimWrapper]:
    if isinstance(wrapper, OptimWrapperDict):
        return dict(wrapper.items())
    return {'': wrapper}


def _fresh_state(wrapper: OptimWrapper) -> State:
    """The state of an optimiser that has made no step."""
    sizes = [len(x['params']) for x in wrapper.optimizer.param_groups]
    places = iter(range(sum(sizes)))
    return dict(
        state={},
        param_groups=[
            dict(without_parameters(group), params=list(islice(places, size)))
            for group, size in zip(wrapper.optimizer.param_groups, sizes)
        ],
    )


def _unit(by_epoch: bool) -> str:
    return 'epochs' if by_epoch else 'iterations'


def _require_left(done: int, length: int, key: str, source: str) -> None:
    if done > length:
        unit = {'max_iters': 'iteration', 'max_epochs': 'epoch'}[key]
        raise CheckpointError(
            f'{printable(source)} cannot be resumed: it has come to {unit} {done}, '
            f'and train_cfg.{key} is {length}. Set it to {done} or more, {_WAY_OUT}.'
        )


def _updates_per_epoch(state: State) -> Optional[int]:
    """Iterations of an epoch in a run over epochs; None if the state does not tell."""
    epochs, iterations = (state.get(x, 0) for x in ('max_epochs', 'max_iters'))
    # In a run over iterations max_epochs is 1.
    if is_count(epochs) and is_count(iterations) and epochs > 1:
        return iterations // epochs
    return None
