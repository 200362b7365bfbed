# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a work_dir tells about its run: curves, evaluations, recipe."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from mmengine.config import Config

from ..engine.hooks.record_recipe import RECORD_NAME
from ..engine.recipe import deviations
from ..visualization.curves import Curve, read_logs
from .published import METRICS, MULTI_SCALE

AVERAGED = ' (averaged weights)'
"""What follows the name of a metric of a running average's weights."""


class Evaluation(NamedTuple):
    """Metrics of one model.

    Attributes:
        name (str): Which model, and when it was evaluated.
        metrics (dict[str, float]): Values in percent by their published names.
        complete (bool): Whether the model was trained to the end of its schedule.
    """

    name: str
    metrics: Dict[str, float]
    complete: bool


class Deviation(NamedTuple):
    """An item in which a run is not its recipe's."""

    item: str
    recipe: Any
    actual: Any


class Run(NamedTuple):
    """A training with its tests, as far as it has got.

    Attributes:
        work_dir (Path): Its work_dir.
        config (str): Name of its config, without suffix.
        progress (str): How far the training is.
        evaluations (list[Evaluation]): The last validation of the training, and the
            newest test of every checkpoint.
        curves (dict[str, list[tuple]]): Logged values (step, value) by name. Empty if
            nothing was trained here.
        deviations (list[Deviation]): From the recipe, over all resumptions.
        recorded (dict[str, Any]): What the recipe does not say: versions, seed, ….
        unrecorded (list[str]): Trainings that left no record of their recipe.
    """

    work_dir: Path
    config: str
    progress: str
    evaluations: List[Evaluation]
    curves: Dict[str, Curve]
    deviations: List[Deviation]
    recorded: Dict[str, Any]
    unrecorded: List[str]


class _Session(NamedTuple):
    """A time-stamped folder: one start of the training or the test tool."""

    folder: Path
    cfg: Config

    @property
    def scalars(self) -> Path:
        """Path: Log of training and validation; a test has none."""
        return self.folder / 'vis_data' / 'scalars.json'


def read_run(work_dir: Union[str, Path]) -> Run:
    """Read the newest run of a work_dir, be it finished, running or interrupted.

    Args:
        work_dir (str | Path): Where `tools/train.py` or `tools/test.py` wrote to. A
            training that resumes another is read as one with it; what was before a
            training from the start is left out.

    Returns:
        Run: What is known of it.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If several configs lie there and none is that of the run.
    """
    work_dir = Path(work_dir)
    sessions = _newest_run(_sessions(work_dir))
    trainings = [session for session in sessions if session.scalars.is_file()]
    curves = read_logs(session.scalars for session in trainings)
    # The configs of tests do not know how the training was shortened, say.
    unit, length = _schedule((trainings or sessions)[-1].cfg)
    evaluations = {}
    progress = 'no training here'
    if trainings:
        validation = _validation(curves, unit, length)
        if validation is not None and validation.complete:
            progress = f'finished, {length} {unit}s'
        else:
            step = _last_step(curves, unit)
            progress = f'running or interrupted, {unit} {step} of {length}'
        if validation is not None:
            evaluations[validation.name] = validation
    for session in sessions:
        test = _test(session, length)
        if test is not None:
            # Another test of the same checkpoint takes the place of an older one.
            evaluations[(test.name, *test.metrics)] = test
    return Run(
        work_dir=work_dir,
        config=_config_name(work_dir, sessions[-1]),
        progress=progress,
        evaluations=list(evaluations.values()),
        curves=curves,
        **_records(trainings),
    )


def _sessions(work_dir: Path) -> List[_Session]:
    """Every session, oldest first."""
    configs = sorted(work_dir.glob('*/vis_data/config.py'))
    if not configs:
        raise FileNotFoundError(
            f'No run in {work_dir}: it has no TIME/vis_data/config.py, which '
            "MMEngine's LocalVisBackend writes."
        )
    return [
        # What the config imports is not needed to read it.
        _Session(path.parents[1], Config.fromfile(path, import_custom_modules=False))
        for path in configs
    ]


def _newest_run(sessions: Sequence[_Session]) -> Sequence[_Session]:
    """The sessions from the last training on that did not resume another."""
    first = 0
    for i, session in enumerate(sessions):
        if session.scalars.is_file() and not session.cfg.get('resume'):
            first = i
    return sessions[first:]


def _config_name(work_dir: Path, session: _Session) -> str:
    """MMEngine copies the config, under its own name, into the work_dir."""
    copies = sorted(work_dir.glob('*.py'))
    if len(copies) > 1:
        text = (session.folder / 'vis_data' / 'config.py').read_text()
        copies = [path for path in copies if path.read_text() == text]
    if len(copies) != 1:
        raise ValueError(
            f'{work_dir} should hold one config, the copy that MMEngine makes, or '
            'several of which one is that of the newest run; it does not. Leave the '
            "run's own one there."
        )
    return copies[0].stem


def _schedule(cfg: Config) -> Tuple[str, int]:
    """Unit and length of the training."""
    if 'max_epochs' in cfg.train_cfg:
        return 'epoch', cfg.train_cfg.max_epochs
    return 'iteration', cfg.train_cfg.max_iters


def _last_step(curves: Dict[str, Curve], unit: str) -> int:
    name = {'epoch': 'epoch', 'iteration': 'iter'}[unit]
    return int(curves[name][-1][1]) if name in curves else 0


def _validation(
    curves: Dict[str, Curve], unit: str, length: int
) -> Optional[Evaluation]:
    """The last validation of a training."""
    steps = [curves[name][-1][0] for name in METRICS if name in curves]
    if not steps:
        return None
    step = int(max(steps))
    last = {name: curve[-1][1] for name, curve in curves.items()}
    return Evaluation(
        f'validation, {unit} {step} of {length}',
        {**published_metrics(last), **published_metrics(last, 'ema_', AVERAGED)},
        complete=step >= length,
    )


def _test(session: _Session, length: int) -> Optional[Evaluation]:
    """What `tools/test.py` logged in a session, None if it did not."""
    log = session.folder / f'{session.folder.name}.json'
    if not log.is_file():
        return None
    try:
        values = json.loads(log.read_text())
    except ValueError:
        return None  # being written
    cfg = session.cfg
    suffix = ''
    if cfg.model.type.endswith('TTAModel'):
        suffix += MULTI_SCALE
    if any(
        hook['type'] == 'UseEMAWeightsHook' for hook in cfg.get('custom_hooks') or []
    ):
        suffix += AVERAGED
    checkpoint = Path(cfg.load_from).name
    step = re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', checkpoint)
    return Evaluation(
        f'test of {checkpoint}',
        published_metrics(values, suffix=suffix),
        complete=step is None or int(step[1]) >= length,
    )


def published_metrics(
    values: Dict[str, float], prefix: str = '', suffix: str = ''
) -> Dict[str, float]:
    """Logged values in the published unit under their published names.

    Args:
        values (dict[str, float]): Values by logged name; others than metrics are left
            out.
        prefix (str): What the logged names have before them. Defaults to ''.
        suffix (str): What the published names get after them. Defaults to ''.
    """
    return {
        metric.name + suffix: values[prefix + name] * metric.scale
        for name, metric in METRICS.items()
        if prefix + name in values
    }


def _records(trainings: Sequence[_Session]) -> Dict[str, Any]:
    """The fields of :class:`Run` that come from recipe.json."""
    found: List[Deviation] = []
    recorded: Dict[str, Any] = {}
    unrecorded: List[str] = []
    for session in trainings:
        path = session.folder / RECORD_NAME
        if not path.is_file():
            unrecorded.append(session.folder.name)
            continue
        record = json.loads(path.read_text())
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
