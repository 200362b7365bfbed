# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The run in a work_dir: its curves, evaluations and recipe."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

from ..engine.hooks.records import RECORD_NAME, RUN_NAME
from ..engine.recipe import deviations
from ..utils.records import is_number, read_record, read_record_lines
from ..utils.text import printable
from ..visualization.curves import Curve
from .published import METRICS, MULTI_SCALE

AVERAGED = ' (averaged weights)'
"""Appended to the name of a metric that was measured with averaged weights."""


class Evaluation(NamedTuple):
    """Metrics of one model.

    Attributes:
        name (str): The model or the checkpoint that was evaluated.
        metrics (dict[str, float]): Values in percent by their published names.
        complete (bool): Whether the model was trained to the end of its schedule.
    """

    name: str
    metrics: Dict[str, float]
    complete: bool


class Deviation(NamedTuple):
    """An item in which a run differs from its recipe."""

    item: str
    recipe: Any
    actual: Any


class Run(NamedTuple):
    """A training with its tests, finished or not.

    Attributes:
        work_dir (Path): Its work_dir.
        config (str): Name of its config, without suffix.
        progress (str): How far the training has come.
        evaluations (list[Evaluation]): The last validation of the training, and the
            newest test of every checkpoint.
        curves (dict[str, list[tuple]]): Logged values (step, value) by name. Empty if
            nothing was trained here.
        deviations (list[Deviation]): From the recipe, over all resumptions.
        recorded (dict[str, Any]): Settings that the recipe leaves open, such as
            versions and the seed.
        unrecorded (list[str]): Trainings that left no record of their recipe.
        unknown (list[str]): Log folders that are left out because they have no
            run.json.
    """

    work_dir: Path
    config: str
    progress: str
    evaluations: List[Evaluation]
    curves: Dict[str, Curve]
    deviations: List[Deviation]
    recorded: Dict[str, Any]
    unrecorded: List[str]
    unknown: List[str]


class _Session(NamedTuple):
    """A time-stamped folder, which one start of the training or the test tool made.

    The fields after ``folder`` are described at :class:`RecordRunHook`.
    """

    folder: Path
    config: str
    unit: str
    length: Optional[int]
    resumed: bool
    checkpoint: Optional[str]
    test_time_augmentation: bool
    averaged_weights: bool

    def reaches(self, step: int) -> bool:
        """Whether a training has ended after this number of epochs or iterations."""
        return self.length is None or step >= self.length

    @property
    def scalars(self) -> Path:
        """Path: Log of training and validation. A test has no such file."""
        return self.folder / 'vis_data' / 'scalars.json'


def read_run(work_dir: Union[str, Path]) -> Run:
    """Read the newest run of a work_dir: finished, running or interrupted.

    Args:
        work_dir (str | Path): Where ``tools/train.py`` or ``tools/test.py`` wrote to. A
            training and those that resume it are read as one run. Whatever is older
            than the last training from the start is left out.

    Returns:
        Run: The run.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If a file of the run is damaged, or of another kind.
    """
    work_dir = Path(work_dir)
    records = sorted(work_dir.glob(f'*/vis_data/{RUN_NAME}'))
    if not records:
        raise FileNotFoundError(
            f'No run in {work_dir}: it has no TIME/vis_data/{RUN_NAME}, which '
            'tools/train.py and tools/test.py write. Of a run without it, evaluate a '
            f'checkpoint again: tools/test.py CONFIG CHECKPOINT --work-dir {work_dir}'
        )
    found = [_session(path) for path in records]
    # The run begins with the last training that did not resume another.
    first = max(
        (i for i, s in enumerate(found) if s.scalars.exists() and not s.resumed),
        default=0,
    )
    sessions = found[first:]
    trainings = [session for session in sessions if session.scalars.exists()]
    curves = read_logs(session.scalars for session in trainings)
    # A test does not know the length of a training that was shortened.
    trained = (trainings or sessions)[-1]
    evaluations: List[Evaluation] = []
    progress = 'no training here'
    if trainings:
        validation = _validation(curves, trained)
        if validation is not None:
            evaluations.append(validation)
        if validation is not None and validation.complete:
            progress = f'finished, {trained.length} {trained.unit}s'
        else:
            step = curves.get(_UNITS[trained.unit], [(0, 0)])[-1][1]
            step = int(step) if math.isfinite(step) else 0
            progress = (
                f'running or interrupted, {trained.unit} {step} of {trained.length}'
            )
    # A test replaces an older one of the same checkpoint and metrics.
    tests = [_test(session, trained) for session in sessions]
    newest = {(test.name, *test.metrics): test for test in tests if test is not None}
    known = {session.folder for session in found}
    return Run(
        work_dir=work_dir,
        config=sessions[-1].config,
        progress=progress,
        evaluations=[*evaluations, *newest.values()],
        curves=curves,
        unknown=[
            printable(path.parent.name)
            for path in sorted(work_dir.glob('*/vis_data'))
            if path.parent not in known
        ],
        **_records(trainings),
    )


def read_logs(logs: Iterable[Path]) -> Dict[str, Curve]:
    """Read scalars.json files as one run, in which each resumes the one before.

    Args:
        logs (Iterable[Path]): The files, oldest first.

    Returns:
        dict[str, list[tuple]]: Points (step, value) by name, in the order of steps. The
        step is the iteration for training values, the epoch or iteration for metrics.

    Raises:
        ValueError: If a file is damaged, or no log.
    """
    points: Dict[str, Dict[float, float]] = {}
    for log in logs:
        for entry in read_record_lines(log):
            numbers = {name: x for name, x in entry.items() if is_number(x)}
            if not math.isfinite(numbers.get('step', math.nan)):
                raise ValueError(
                    f'{printable(log)} is no log of a training: an entry has the step '
                    f'{printable(entry.get("step"))}. Move its folder out of the '
                    'work_dir.'
                )
            for name, value in numbers.items():
                # A resumed run goes over the steps since its checkpoint again.
                points.setdefault(name, {})[numbers['step']] = value
    return {name: sorted(curve.items()) for name, curve in points.items()}


# The types that a value of run.json may have.
_TYPES = {
    'config': (str,),
    'unit': (str,),
    'length': (int, type(None)),
    'resumed': (bool,),
    'checkpoint': (str, type(None)),
    'test_time_augmentation': (bool,),
    'averaged_weights': (bool,),
}
# The name of each unit in logs.
_UNITS = {'epoch': 'epoch', 'iteration': 'iter'}


def _session(path: Path) -> _Session:
    record = read_record(path) or {}
    for field, types in _TYPES.items():
        value = record.get(field)
        if type(value) not in types or (field == 'unit' and value not in _UNITS):
            raise ValueError(
                f'{printable(path)} does not tell what was run: {field} is '
                f'{printable(value)}. Move its folder out of the work_dir.'
            )
    values = {field: _shown(record[field]) for field in _TYPES}
    return _Session(path.parents[1], **values)


def _shown(value: Any) -> Any:
    """A value of a record, whose texts cannot control a terminal."""
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return printable(value, limit=1000) if isinstance(value, str) else value


def _validation(curves: Dict[str, Curve], training: _Session) -> Optional[Evaluation]:
    """The last validation of a training."""
    steps = [curves[name][-1][0] for name in METRICS if name in curves]
    if not steps:
        return None
    step = int(max(steps))
    last = {name: curve[-1][1] for name, curve in curves.items()}
    return Evaluation(
        f'validation, {training.unit} {step} of {training.length}',
        {**published_metrics(last), **published_metrics(last, 'ema_', AVERAGED)},
        complete=training.reaches(step),
    )


def _test(session: _Session, training: _Session) -> Optional[Evaluation]:
    """What ``tools/test.py`` logged in a session; None if it logged nothing."""
    log = session.folder / f'{session.folder.name}.json'
    values = read_record(log) if log.exists() else None
    if values is None or session.checkpoint is None:
        return None
    suffix = MULTI_SCALE if session.test_time_augmentation else ''
    suffix += AVERAGED if session.averaged_weights else ''
    step = re.fullmatch(r'(?:epoch|iter)_([0-9]{1,18})\.pth', session.checkpoint)
    return Evaluation(
        f'test of {session.checkpoint}',
        published_metrics(values, suffix=suffix),
        complete=step is None or training.reaches(int(step[1])),
    )


def published_metrics(
    values: Dict[str, float], prefix: str = '', suffix: str = ''
) -> Dict[str, float]:
    """Metrics in the published unit, under their published names.

    Args:
        values (dict[str, float]): Values by logged name. What is no metric or no number
            is left out.
        prefix (str): Prefix of the logged names. Defaults to ''.
        suffix (str): Suffix for the published names. Defaults to ''.
    """
    return {
        metric.name + suffix: values[prefix + name] * metric.scale
        for name, metric in METRICS.items()
        if is_number(values.get(prefix + name))
    }


def _records(trainings: Sequence[_Session]) -> Dict[str, Any]:
    """The fields of :class:`Run` that come from recipe.json."""
    found: List[Deviation] = []
    recorded: Dict[str, Any] = {}
    unrecorded: List[str] = []
    for session in trainings:
        path = session.folder / RECORD_NAME
        record = _recipe(path) if path.exists() else None
        if record is None:
            unrecorded.append(printable(session.folder.name))
            continue
        for item in deviations(record):
            deviation = Deviation(item, record[item]['recipe'], record[item]['actual'])
            if deviation not in found:
                found.append(deviation)
        recorded = {
            item: values['actual']
            for item, values in record.items()
            if values['recipe'] is None and values['actual'] is not None
        }
    return dict(deviations=found, recorded=recorded, unrecorded=unrecorded)


def _recipe(path: Path) -> Optional[Dict[str, Dict[str, Any]]]:
    """A record of :func:`mlla_mm.engine.recipe.compare`; None if its end is missing."""
    record = read_record(path)
    if record is None:
        return None
    for item, values in record.items():
        if not isinstance(values, dict) or not all(
            key in values and _is_recipe_value(values[key]) for key in _SIDES
        ):
            raise ValueError(
                f'{printable(path)} is no record of a recipe: {printable(item)} is '
                f'{printable(values)}. Move its folder out of the work_dir.'
            )
    return {
        printable(item): {key: _shown(values[key]) for key in _SIDES}
        for item, values in record.items()
    }


_SIDES = ('recipe', 'actual')


def _is_recipe_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, str) for part in value)
    return value is None or isinstance(value, (bool, str)) or is_number(value)
