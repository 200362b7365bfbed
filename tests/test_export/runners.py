# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Exported files of both formats, run without the package."""

import pytest
import torch

from mlla_mm.compat import pytorch


def in_both_formats(names, usual):
    """Parameters: every name in two formats. Those that are not usual are slow."""
    return [
        pytest.param(
            format, name, marks=[] if name in usual[format] else pytest.mark.slow
        )
        for format in ('torchscript', 'onnx')
        for name in names
    ]


def skip_unless_supported(format):
    """Skip a test if a package is missing, or PyTorch too old, for a format."""
    if format == 'onnx':
        pytest.importorskip('onnx')
        pytest.importorskip('onnxruntime')
    elif format == 'torch-export' and not pytorch.TELLS_EXPORT:
        pytest.skip('needs PyTorch 2.7')


def open_file(format, path):
    """A function of images and settings that gives the outputs by name or in order."""
    if format == 'torchscript':
        return torch.jit.load(str(path))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    names = [x.name for x in inputs]

    def run(*values):
        feed = {name: x.numpy() for name, x in zip(names, values)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run
