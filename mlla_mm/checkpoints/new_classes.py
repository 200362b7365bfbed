# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds the tensors of a model whose shapes depend on the number of its classes."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.registry import MODELS
from torch import Tensor

# Panoptic heads add up things and stuff.
_COUNTS = ('num_classes', 'num_things_classes')


class OtherClasses(NamedTuple):
    """Tensors that a file has for another number of classes than a model.

    Attributes:
        in_file (int): Number of classes in the file.
        in_model (int): Number of classes in the model.
        names (list[str]): The tensors, by their names in the model.
    """

    in_file: int
    in_model: int
    names: List[str]


def find_other_classes(
    config: Mapping, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> List[OtherClasses]:
    """Find the tensors that do not fit because the classes are others.

    Two models with more classes are built, to see which shapes grow, and how. All of a
    part of the model, such as a head, that grow have to agree on the number of classes
    in the file. What else may not fit is not looked at.

    Args:
        config (Mapping): The model's config.
        own (Mapping[str, Tensor]): State dict of the model.
        weights (Mapping[str, Tensor]): State dict in the file.

    Returns:
        list[OtherClasses]: One for each pair of numbers. Empty if all shapes fit, or if
        no model with more classes can be built.
    """
    shared = own.keys() & weights.keys()
    if all(own[key].shape == getattr(weights[key], 'shape', None) for key in shared):
        return []
    classes = dict(_classes(config))
    try:
        first, second = (_shapes(_with_more_classes(config, more)) for more in (1, 2))
    except Exception:
        # The config does not allow it, such as one with a list of weights of classes.
        return []
    growing: Dict[Optional[str], List[str]] = {}
    for name in own:
        if first.get(name) != second.get(name):
            growing.setdefault(_part_of(name, classes), []).append(name)
    found: Dict[Tuple[int, int], List[str]] = {}
    for part, names in growing.items():
        added = {_added(first[x], second[x], weights.get(x)) for x in names}
        more = added.pop()
        if part is not None and more and not added and classes[part] + more > 0:
            numbers = (classes[part] + more, classes[part])
            found.setdefault(numbers, []).extend(names)
    return [OtherClasses(*numbers, names) for numbers, names in found.items()]


def _classes(config: Any, prefix: str = '') -> Iterator[Tuple[str, int]]:
    """The parts of a model's config with a number of classes, as prefixes of names."""
    if isinstance(config, Mapping):
        numbers = [config[key] for key in _COUNTS if _is_count(config.get(key))]
        if numbers:
            stuff = config.get('num_stuff_classes')
            yield prefix, numbers[0] + (stuff if _is_count(stuff) else 0)
        for key, value in config.items():
            yield from _classes(value, f'{prefix}{key}.')
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            yield from _classes(value, f'{prefix}{i}.')


def _part_of(name: str, classes: Dict[str, int]) -> Optional[str]:
    """The innermost part that a tensor belongs to."""
    parts = [prefix for prefix in classes if name.startswith(prefix)]
    # Models with other names than their configs, such as a student's, have one number.
    if not parts and len(set(classes.values())) == 1:
        parts = list(classes)
    return max(parts, key=len, default=None)


def _with_more_classes(config: Any, more: int) -> Any:
    config = copy.deepcopy(config)
    _add_classes(config, more)
    return config


def _add_classes(config: Any, more: int) -> None:
    """Raise the numbers of classes in a model's config, in place."""
    if isinstance(config, dict):
        own = config.get('num_classes')
        # Of mmseg's heads: the same number, or one map for two classes.
        if own and config.get('out_channels') in (own, 1 if own == 2 else own):
            config['out_channels'] = own + more
        for key in _COUNTS:
            if _is_count(config.get(key)):
                config[key] += more
    values = config.values() if isinstance(config, dict) else config
    for value in values if isinstance(config, (dict, list, tuple)) else ():
        _add_classes(value, more)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shapes(config: Mapping) -> Dict[str, Sequence[int]]:
    """Build a model, and return the shapes of its state dict."""
    with torch.random.fork_rng(devices=[]):
        model = MODELS.build(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _added(first: Sequence[int], second: Sequence[int], tensor: Any) -> Optional[int]:
    """How many classes more than the model a tensor is for.

    Args:
        first (Sequence[int]): Shape with one class more.
        second (Sequence[int]): Shape with two classes more.
        tensor (Tensor, optional): The tensor.

    Returns:
        int | None: Negative for fewer; None if no number gives the tensor's shape.
    """
    if not isinstance(tensor, Tensor) or not tensor.dim() == len(first) == len(second):
        return None
    sizes = list(zip(first, second, tensor.shape))
    steps = {divmod(size - a, b - a) for a, b, size in sizes if a != b}
    rests = {size - a for a, b, size in sizes if a == b}
    if len(steps) != 1 or rests - {0}:
        return None
    step, rest = steps.pop()
    return None if rest else step + 1
