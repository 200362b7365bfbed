# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Models as files that run without this package, and such files in a model's place."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, Union

from .compare import compare_outputs, compare_predictions
from .errors import ExportError
from .exported import ExportedModel
from .formats import (
    FORMATS,
    Options,
    example_inputs,
    load,
    quantize,
    require_support,
    texts,
    write,
)
from .parts import Part, select_part, whole_model

__all__ = [
    'FORMATS',
    'ExportError',
    'ExportedModel',
    'Options',
    'Part',
    'export_model',
    'require_support',
    'select_part',
    'whole_model',
]

DEFAULT_OPTIONS = Options()


def export_model(
    part: Part,
    format: str,
    path: Union[str, Path],
    options: Options = DEFAULT_OPTIONS,
) -> Dict[str, float]:
    """Write a model to a file, and compare the file with eager execution.

    The file takes any image size and, but for detectors, any batch size. It is compared
    at other sizes than the one that it was traced with. TorchScript and torch-export
    programs run on the device that the model is on now.

    Args:
        part (Part): What to export, in evaluation mode.
        format (str): 'torchscript', 'onnx' or 'torch-export'.
        path (str | Path): File to write.
        options (Options): Size of the trace, opset, and whether linear layers become
            int8. Those of an int8 file are compared before they do.

    Returns:
        dict[str, float]: The largest difference to eager execution of each kind in
        :data:`mlla_mm.export.compare.TOLERANCES`.

    Raises:
        ExportError: If the format is unknown, if it needs a package or a newer PyTorch,
            if the path is a folder, if the model is in training mode or cannot be
            exported, or if the outputs of the file differ by too much. Then a file of
            this name is as it was.
    """
    require_support(format, options)
    if part.module.training:
        raise ExportError('The model is in training mode: call its eval() before.')
    path = Path(path)
    if path.is_dir():
        raise ExportError(f'{path} is a folder: give the path of a file.')
    path.parent.mkdir(parents=True, exist_ok=True)
    device = next(part.module.parameters()).device
    with TemporaryDirectory(prefix='.export_', dir=path.parent) as folder:
        written = Path(folder) / f'exact{FORMATS[format]}'
        write(part, format, written, options)
        run = load(format, written, device)
        if part.model is None:
            differences = compare_outputs(part, run, options.shape)
        else:
            exported = ExportedModel(
                run, list(part.outputs), texts(part.metadata), part.reverse_channels
            )
            differences = compare_predictions(
                part.model, exported, options.shape, format != 'torch-export'
            )
        if options.int8:
            exact, written = written, Path(folder) / 'int8.onnx'
            quantize(exact, written)
            load(format, written, device)(*example_inputs(part, 1, *options.shape))
        os.replace(written, path)
    return differences
