# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Checkpoint files for tests: laid out like the authors', and such that would harm."""

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Optional

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


def name(module: str, attribute: str) -> bytes:
    """Opcodes that look up a name. Only those of protocol 4 look up dotted ones."""
    if '.' not in attribute:
        return f'c{module}\n{attribute}\n'.encode()
    return value(module) + value(attribute) + b'\x93'


def value(content: Any) -> bytes:
    """Opcodes that make a value."""
    return pickle.dumps(content, 2)[2:-1]


def call(function: bytes, *args: bytes) -> bytes:
    """Opcodes that call what other opcodes make."""
    return function + b'(' + b''.join(args) + b'tR'


def whole(opcodes: bytes) -> bytes:
    """A pickle."""
    return b'\x80\x04' + opcodes + b'.'


def attacks(marker: Path) -> Dict[str, bytes]:
    """Pickles that make the file ``marker`` when they are loaded."""
    code = f'open({str(marker)!r}, "w").close()'
    command = value(f'echo > {marker}')
    inner = io.BytesIO()
    torch.save(Call(exec, code), inner)
    objects = np.empty(1, dtype=object)
    objects[0] = Call(exec, code)
    system, getattr_ = name('os', 'system'), name('builtins', 'getattr')
    return {
        'system': whole(call(system, command)),
        'exec': pickle.dumps(Call(exec, code), 2),
        'deep in weights': pickle.dumps({'model': {'a': [(Call(exec, code),)]}}, 2),
        'yacs': pickle.dumps({'config': Call(exec, code), 'model': {}}, 2),
        'array': pickle.dumps(objects, 2),
        'storage': pickle.dumps(
            Call(torch.storage._load_from_bytes, inner.getvalue()), 2
        ),
        'dotted name': whole(call(name('torch', 'hub.os.system'), command)),
        'dotted name beside HistoryBuffer': whole(
            call(name('mmengine.logging.logger', 'os.system'), command)
        ),
        'getattr': whole(
            call(
                call(
                    getattr_,
                    call(getattr_, name('torch', 'hub'), value('os')),
                    value('system'),
                ),
                command,
            )
        ),
        'partial': whole(call(call(name('functools', 'partial'), system, command))),
        'rebuild': whole(
            call(
                name('torch._tensor', '_rebuild_from_type_v2'),
                *(system, name('builtins', 'int'), b'(' + command + b't', b'}'),
            )
        ),
        # No function, but a class.
        'file': whole(call(name('io', 'FileIO'), value(str(marker)), value('w'))),
        'inst': whole(b'(' + command + b'ios\nsystem\n'),
        'obj': whole(b'(' + system + command + b'o'),
    }


def save_pickle(content: bytes, path: Path, legacy: bool = False) -> None:
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
    path.write_bytes(buffer.getvalue())
    rewrite(path, lambda record, old: content if record == 'data.pkl' else old)


def rewrite(
    path: Path,
    change: Callable[[str, bytes], Optional[bytes]],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Change a checkpoint.

    Args:
        path (Path): The file.
        change (Callable): Gets the name of a record, such as 'data/0', and its bytes,
            and returns others, or None to leave the record out.
        compression (int): As in ``zipfile``. Defaults to none.
    """
    with zipfile.ZipFile(path) as old:
        records = {record: old.read(record) for record in old.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as new:
        for record, content in records.items():
            content = change(record.split('/', 1)[1], content)
            if content is not None:
                new.writestr(record, content)
