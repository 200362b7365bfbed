# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Checkpoint files for tests: laid out like the authors', and such that would harm."""

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch
from torch import Tensor

from . import reference


def official_classifier(arch: str) -> Dict[str, Tensor]:
    """The weights of an official ImageNet file, rotation tables included."""
    weights = reference.official_weights(f'mlla-{arch}')
    for name in reference.official_rotations(f'mlla-{arch}'):
        weights[name] = torch.zeros(3, 3, 2)
    return weights


def prefixed(weights: Dict[str, Tensor], prefix: str) -> Dict[str, Tensor]:
    return {f'{prefix}{key}': value for key, value in weights.items()}


class _Config(dict):
    """What yacs makes of a config, without yacs."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__['__immutable__'] = False
        self.__dict__['__renamed_keys__'] = {'A': ('B', 'moved')}


def save_official_training(weights: Dict[str, Tensor], path: Path, **more) -> None:
    """A training checkpoint of the authors' classification code."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = _Config
    _Config.__module__, _Config.__qualname__ = 'yacs.config', 'CfgNode'
    sys.modules.update({'yacs': types.ModuleType('yacs'), 'yacs.config': module})
    try:
        torch.save(
            dict(
                model=weights,
                optimizer=dict(state={0: dict(step=3)}, param_groups=[dict(lr=1e-3)]),
                lr_scheduler=dict(t_mul=1.0, base_values=[1e-3]),
                max_accuracy=np.float64(83.5),
                scaler=dict(scale=65536.0),
                epoch=299,
                config=_Config(MODEL=_Config(TYPE='mlla', DEPTHS=[2, 4, 8, 4])),
                **more,
            ),
            path,
        )
    finally:
        del sys.modules['yacs.config'], sys.modules['yacs']


class Call:
    """Pickled, it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _name(module: str, name: str) -> bytes:
    """Opcodes that look up a name. Only those of protocol 4 look up dotted ones."""
    if '.' not in name:
        return f'c{module}\n{name}\n'.encode()
    return _value(module) + _value(name) + b'\x93'


def _value(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _call(function: bytes, *args: bytes) -> bytes:
    return function + b'(' + b''.join(args) + b'tR'


def _whole(opcodes: bytes) -> bytes:
    return b'\x80\x04' + opcodes + b'.'


def attacks(marker: Path) -> Dict[str, bytes]:
    """Pickles that make the file ``marker`` when they are loaded."""
    code = f'open({str(marker)!r}, "w").close()'
    command = _value(f'echo > {marker}')
    inner = io.BytesIO()
    torch.save(Call(exec, code), inner)
    objects = np.empty(1, dtype=object)
    objects[0] = Call(exec, code)
    system, getattr_ = _name('os', 'system'), _name('builtins', 'getattr')
    return {
        'system': _whole(_call(system, command)),
        'exec': pickle.dumps(Call(exec, code), 2),
        'deep in weights': pickle.dumps({'model': {'a': [(Call(exec, code),)]}}, 2),
        'yacs': pickle.dumps({'config': Call(exec, code), 'model': {}}, 2),
        'array': pickle.dumps(objects, 2),
        'storage': pickle.dumps(
            Call(torch.storage._load_from_bytes, inner.getvalue()), 2
        ),
        'dotted name': _whole(_call(_name('torch', 'hub.os.system'), command)),
        'dotted name beside HistoryBuffer': _whole(
            _call(_name('mmengine.logging.logger', 'os.system'), command)
        ),
        'getattr': _whole(
            _call(
                _call(
                    getattr_,
                    _call(getattr_, _name('torch', 'hub'), _value('os')),
                    _value('system'),
                ),
                command,
            )
        ),
        'partial': _whole(_call(_call(_name('functools', 'partial'), system, command))),
        'rebuild': _whole(
            _call(
                _name('torch._tensor', '_rebuild_from_type_v2'),
                *(system, _name('builtins', 'int'), b'(' + command + b't', b'}'),
            )
        ),
        # No function, but a class.
        'file': _whole(_call(_name('io', 'FileIO'), _value(str(marker)), _value('w'))),
        'inst': _whole(b'(' + command + b'ios\nsystem\n'),
        'obj': _whole(b'(' + system + command + b'o'),
    }


def save_pickle(content: bytes, path: Path, legacy: bool) -> None:
    """A file in one of PyTorch's formats with this pickle in it."""
    buffer = io.BytesIO()
    torch.save(None, buffer, _use_new_zipfile_serialization=not legacy)
    if legacy:
        # PyTorch's own pickles, then the object's, then the list of storages.
        own, storages = pickle.dumps(None, 2), pickle.dumps([], 2)
        assert buffer.getvalue().endswith(own + storages)
        start = buffer.getvalue()[: -len(own + storages)]
        path.write_bytes(start + content + storages)
        return
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, 'w') as new:
        for name in old.namelist():
            is_pickle = name.endswith('/data.pkl')
            new.writestr(name, content if is_pickle else old.read(name))
