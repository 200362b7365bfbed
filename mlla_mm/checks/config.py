# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What is wrong with a config, said before anything is built from it.

Only what is sure to be wrong is an error. What these checks do not know, such as other
people's backbones, necks and data sets, they leave alone.
"""

import difflib
import inspect
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    RUNNERS,
    TASK_UTILS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    WEIGHT_INITIALIZERS,
    DefaultScope,
    Registry,
)

from ..arch import parse_arch
from ..engine.options import kind_of
from ..models.backbones import MLLA
from ..reproducible.loops import require_seeded

_MODEL = (MODELS, TASK_UTILS, WEIGHT_INITIALIZERS, TRANSFORMS)
_LOADER = (DATASETS, TRANSFORMS, DATA_SAMPLERS, FUNCTIONS, MODELS, TASK_UTILS)
# What the types under a key of a config may be, and those of the key itself first.
_REGISTRIES: Dict[str, Tuple[Registry, ...]] = {
    'model': _MODEL,
    'tta_model': _MODEL,
    **dict.fromkeys(('train_dataloader', 'val_dataloader', 'test_dataloader'), _LOADER),
    'tta_pipeline': (TRANSFORMS,),
    'val_evaluator': (METRICS,),
    'test_evaluator': (METRICS,),
    'train_cfg': (LOOPS,),
    'val_cfg': (LOOPS,),
    'test_cfg': (LOOPS,),
    'optim_wrapper': (OPTIM_WRAPPERS, OPTIMIZERS, OPTIM_WRAPPER_CONSTRUCTORS),
    'param_scheduler': (PARAM_SCHEDULERS,),
    'default_hooks': (HOOKS, MODELS),
    'custom_hooks': (HOOKS, MODELS, TRANSFORMS, OPTIMIZERS, OPTIM_WRAPPERS),
    'visualizer': (VISUALIZERS, VISBACKENDS),
    'log_processor': (LOG_PROCESSORS,),
}
# Looked up elsewhere: functions and layers of mmcv.ops, transforms of albumentations,
# names of mmdet's FPG.
_OTHER_KEYS = re.compile('nms|roi_layer|.*_trans')
_OTHER_TYPES = ('Albu', 'Albumentations')
# Built in any case, so an unknown type there is an error whatever its name is.
_ALWAYS_BUILT = (
    'model.type',
    'model.backbone.type',
    'model.neck.type',
    'train_dataloader.dataset.type',
    'val_dataloader.dataset.type',
    'test_dataloader.dataset.type',
    'optim_wrapper.type',
    'optim_wrapper.optimizer.type',
)
# The default hooks that None switches off.
_OF_MMENGINE = (
    'runtime_info timer sampler_seed logger param_scheduler checkpoint'
).split()
# How alike two names are, from 0 to 1, if one is meant for the other; less if it is
# sure that the one is wrong.
_ALIKE, _SIMILAR = 0.85, 0.6
# Heads whose classes are those of the data set, by the key that holds them.
_HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head', 'head')
_OF_CLASSIFIERS = ('model.head.num_classes', 'model.data_preprocessor.num_classes')
_NECKS = ('FPN', 'PAFPN', 'BFP', 'ChannelMapper', 'NASFPN', 'FPN_CARAFE')


def check_config(cfg: Config) -> None:
    """Look for mistakes in the config of a run.

    Hooks that are switched off in a way that MMEngine does not know; types that no
    registry has, although one has a similar name; arguments of MLLA; channels between
    the backbone and what follows; numbers of classes.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.

    Raises:
        ValueError: Names the first mistake by its key in the config, and what is right.
    """
    _check_hooks(cfg)
    _check_runner(cfg)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        for key, registries in _REGISTRIES.items():
            _check_types(cfg.get(key), key, registries)
        model = cfg.get('model')
        if isinstance(model, Mapping):
            # Test-time augmentation wraps the model.
            model = model.get('module', model)
            _check_channels(model)
            for split in ('train', 'val', 'test'):
                _check_classes(model, cfg.get(f'{split}_dataloader'), split)


def check_loop(cfg: Config) -> None:
    """Look for what a config wants of its training loop and does not get.

    Args:
        cfg (Config): The config of a training run.

    Raises:
        ValueError: Names it, and the way out.
    """
    if cfg.get('skip_corrupt_images'):
        raise ValueError(
            'skip_corrupt_images is an argument of the training loop: write '
            'train_cfg = dict(skip_corrupt_images=True) in its place.'
        )
    for name in ('skip_corrupt_images', 'micro_batches'):
        if name in cfg.train_cfg:
            require_seeded(cfg.train_cfg, f'train_cfg.{name}')
    sampler = cfg.train_dataloader.get('sampler')
    if isinstance(sampler, Mapping) and kind_of(sampler) == 'SharedSampler':
        raise ValueError(
            'mlla_mm 0.1 wrote this config into a work_dir, with what its loop needed '
            'around data and sampler. Train with the config that it was made of.'
        )


def _check_runner(cfg: Config) -> None:
    kind = cfg.get('runner_type', 'Runner')
    if isinstance(kind, str) and RUNNERS.get(kind) is None:
        raise ValueError(
            f"runner_type is '{kind}', which is not registered. Name the module that "
            'registers it in custom_imports.'
        )


def _check_hooks(cfg: Config) -> None:
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if hook is None and name not in _OF_MMENGINE:
            raise ValueError(
                f'default_hooks.{name} is None, which switches off hooks of MMEngine '
                f"alone: write default_hooks = dict({name}=dict(type='NoHook'))."
            )


def require_work_dir(cfg: Config) -> None:
    """Make the folder of a run, and see that it can be written to.

    Args:
        cfg (Config): The run's config.

    Raises:
        ValueError: If it cannot, or if MMEngine, which copies the config there, would
            write elsewhere through a link.
    """
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir):
            pass
    except OSError as error:
        raise ValueError(
            f'The work_dir cannot be written to: {error}. Choose one with --work-dir.'
        ) from error
    copy = Path(cfg.work_dir) / Path(cfg.filename or 'of no file').name
    if copy.is_symlink() or (copy.exists() and not copy.is_file()):
        raise ValueError(
            f'{copy} is a link, folder or pipe, and the config is to be copied there. '
            'Remove it, or choose another folder with --work-dir.'
        )


def nearest(name: str, names: Iterable[str], alike: float = _SIMILAR) -> Optional[str]:
    """The name most like another one, case aside; None if none is like it.

    Args:
        name (str): The name.
        names (Iterable[str]): What to choose from.
        alike (float): How alike they have to be, from 0 to 1. Defaults to 0.6.
    """
    by_lower = {x.lower(): x for x in sorted(names)}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=alike)
    return by_lower[found[0]] if found else None


# Types.


def _check_types(value: Any, path: str, registries: Tuple[Registry, ...]) -> None:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_types(item, f'{path}[{i}]', registries)
        return
    if not isinstance(value, Mapping):
        return
    if value.get('_scope_'):
        # Whatever another package calls its own.
        return
    kind = value.get('type')
    if isinstance(kind, str):
        _check_type(kind, f'{path}.type', registries)
    constructor = value.get('constructor')
    if path == 'optim_wrapper' and isinstance(constructor, str):
        _check_type(constructor, f'{path}.constructor', (OPTIM_WRAPPER_CONSTRUCTORS,))
    if kind in _OTHER_TYPES:
        return
    for key, item in value.items():
        if not _OTHER_KEYS.fullmatch(str(key)):
            _check_types(item, f'{path}.{key}', registries)


def _check_type(name: str, path: str, registries: Tuple[Registry, ...]) -> None:
    known: Set[str] = set()
    for root in registries:
        registry = _scoped(root)
        if _find(registry, name) is not None:
            return
        known |= _names(registry)
    meant = nearest(name, known, _SIMILAR if path in _ALWAYS_BUILT else _ALIKE)
    if meant is not None:
        raise ValueError(
            f"{path} is '{name}', which is not registered: is '{meant}' meant?"
        )
    if path in _ALWAYS_BUILT:
        scope = DefaultScope.get_current_instance().scope_name
        raise ValueError(
            f"{path} is '{name}', which is not registered in {scope}. Name the module "
            'that registers it in custom_imports.'
        )


def _scoped(root: Registry) -> Registry:
    """The default scope's registry of a kind."""
    if root is FUNCTIONS:
        # The packages have none of their own, of which MMEngine would warn.
        return root
    with root.switch_scope_and_registry(None) as registry:
        return registry


def _find(registry: Registry, name: str) -> Any:
    try:
        return registry.get(name)
    except (ImportError, RuntimeError):
        return None


def _names(registry: Optional[Registry]) -> Set[str]:
    names: Set[str] = set()
    while registry is not None:
        names |= registry.module_dict.keys()
        registry = registry.parent
    return names


def _class(registry: Registry, kind: Any) -> Any:
    """The class that a ``type`` stands for, or None."""
    if not isinstance(kind, str):
        return kind
    return _find(_scoped(registry), kind)


# Channels.


class _Outputs(NamedTuple):
    """Channels of the maps that a part of the model hands on, and whose they are."""

    channels: List[int]
    source: str


def _check_channels(model: Mapping) -> None:
    backbone = model.get('backbone')
    if not isinstance(backbone, Mapping):
        return
    outputs = _backbone_outputs(backbone)
    if outputs is None:
        return
    neck = model.get('neck')
    if isinstance(neck, Mapping) and neck.get('type') in _NECKS:
        _expect(neck.get('in_channels'), outputs, 'model.neck.in_channels')
        _check_behind_neck(model, neck)
        return
    head = model.get('head')
    if isinstance(head, Mapping) and _keeps_channels(neck):
        last = outputs._replace(channels=outputs.channels[-1:])
        _expect(_one(head.get('in_channels')), last, 'model.head.in_channels')
    if neck is None:
        for key in ('decode_head', 'auxiliary_head'):
            for path, part in _parts(model.get(key), f'model.{key}'):
                _check_decode_head(part, outputs, path)


def _backbone_outputs(backbone: Mapping) -> Optional[_Outputs]:
    """What an MLLA gives; None for other backbones."""
    kind = _class(MODELS, backbone.get('type'))
    if not (inspect.isclass(kind) and issubclass(kind, MLLA)):
        return None
    options = {k: v for k, v in backbone.items() if k not in ('type', 'init_cfg')}
    known = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in options:
        if name not in known and not takes_any:
            meant = nearest(name, known)
            hint = f"is '{meant}' meant?" if meant else f'choose from {list(known)}.'
            raise ValueError(
                f'model.backbone.{name} is not an argument of {kind.__name__}: {hint}'
            )
    if kind is not MLLA:
        return None
    try:
        embed_dims, _, num_heads = parse_arch(options.get('arch', 'tiny'))
        # As wide as the network and a block deep: its own checks, in no time.
        shallow = dict(embed_dims=embed_dims, depths=(1,) * 4, num_heads=num_heads)
        indices = MLLA(**dict(options, arch=shallow)).out_indices
    except (TypeError, ValueError) as error:
        raise ValueError(f'model.backbone: {error}') from error
    arch = options.get('arch', 'tiny')
    arch = f"arch '{arch}'" if isinstance(arch, str) else f'embed_dims {embed_dims}'
    return _Outputs(
        [embed_dims * 2**i for i in indices], f'MLLA of {arch}, out_indices {indices}'
    )


def _check_behind_neck(model: Mapping, neck: Mapping) -> None:
    width = neck.get('out_channels')
    if not isinstance(width, int):
        return
    outputs = _Outputs([width], f"{neck['type']}'s out_channels")
    for path in (
        'rpn_head.in_channels',
        'bbox_head.in_channels',
        'roi_head.bbox_roi_extractor.out_channels',
        'roi_head.mask_roi_extractor.out_channels',
    ):
        value: Any = model
        for key in path.split('.'):
            value = value.get(key) if isinstance(value, Mapping) else None
        _expect(_one(value), outputs, f'model.{path}')


def _keeps_channels(neck: Any) -> bool:
    return neck is None or (
        isinstance(neck, Mapping) and neck.get('type') == 'GlobalAveragePooling'
    )


def _check_decode_head(head: Mapping, outputs: _Outputs, path: str) -> None:
    index = head.get('in_index', -1)
    indices = list(index) if isinstance(index, (list, tuple)) else [index]
    count = len(outputs.channels)
    if not all(isinstance(i, int) and -count <= i < count for i in indices):
        raise ValueError(
            f'{path}.in_index is {index}, but the backbone gives {count} '
            f'{"maps" if count > 1 else "map"} ({outputs.source}).'
        )
    channels = head.get('in_channels')
    if isinstance(index, int):
        channels = _one(channels)
    chosen = outputs._replace(channels=[outputs.channels[i] for i in indices])
    _expect(channels, chosen, f'{path}.in_channels')


def _one(channels: Any) -> Any:
    return [channels] if isinstance(channels, int) else channels


def _expect(channels: Any, outputs: _Outputs, path: str) -> None:
    """Compare a list of channels with what comes in; other values are left alone."""
    if not isinstance(channels, (list, tuple)) or list(channels) == outputs.channels:
        return
    shown, right = (
        x[0] if len(x) == 1 else list(x) for x in (channels, outputs.channels)
    )
    raise ValueError(
        f'{path} is {shown}, but what comes in has {right} channels ({outputs.source}).'
    )


# Classes.


def head_classes(model: Mapping) -> Iterator[Tuple[str, int]]:
    """Numbers of classes in a model's config, with their keys."""
    preprocessor = model.get('data_preprocessor')
    if isinstance(preprocessor, Mapping):
        count = preprocessor.get('num_classes')
        if isinstance(count, int):
            yield 'model.data_preprocessor.num_classes', count
    parents = [('model', model)]
    if isinstance(model.get('roi_head'), Mapping):
        parents.append(('model.roi_head', model['roi_head']))
    main = None
    for path, parent in parents:
        for key in _HEADS:
            for place, head in _parts(parent.get(key), f'{path}.{key}'):
                main = head.get('type') if key == 'decode_head' else main
                # Other auxiliary heads may have a task of their own, edges for one.
                if key == 'auxiliary_head' and head.get('type') not in (
                    'FCNHead',
                    main,
                ):
                    continue
                count = head.get('num_classes')
                if isinstance(count, int) and not head.get('class_agnostic'):
                    yield f'{place}.num_classes', count


def _parts(value: Any, path: str) -> Iterator[Tuple[str, Mapping]]:
    """A head, or each of a list of them, with its key."""
    if isinstance(value, Mapping):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            if isinstance(item, Mapping):
                yield f'{path}[{i}]', item


def innermost_dataset(loader: Any) -> Optional[Mapping]:
    """The config of a data loader's data set, without wrappers; None if unclear."""
    dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
    while isinstance(dataset, Mapping) and 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset if isinstance(dataset, Mapping) else None


def dataset_classes(dataset: Mapping) -> Optional[Sequence[str]]:
    """Names of the classes that a data set's config or class gives, if they do."""
    metainfo = dataset.get('metainfo')
    classes = metainfo.get('classes') if isinstance(metainfo, Mapping) else None
    if classes is None:
        kind = _class(DATASETS, dataset.get('type'))
        known = getattr(kind, 'METAINFO', None) or {}
        # Panoptic ones have more classes than the heads for things.
        classes = None if 'thing_classes' in known else known.get('classes')
    return classes if isinstance(classes, (list, tuple)) else None


def _check_classes(model: Mapping, loader: Any, split: str) -> None:
    dataset = innermost_dataset(loader)
    classes = dataset_classes(dataset) if dataset is not None else None
    # Heads of models that are told the classes in words have places for words.
    if not classes or 'language_model' in model:
        return
    names = ', '.join(map(str, classes[:3])) + (', ...' if len(classes) > 3 else '')
    for path, count in head_classes(model):
        # A classifier of more classes can be evaluated on some of them.
        on_some = split != 'train' and path in _OF_CLASSIFIERS
        if count < len(classes) or (count > len(classes) and not on_some):
            raise ValueError(
                f'{path} is {count}, but the data set of {split}_dataloader has '
                f'{len(classes)} classes ({names}): set the one or its '
                'metainfo.classes right.'
            )
