# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Exported files, run without the package."""

import pytest
import torch


def skip_unless_supported(format):
    """Skip a test if a package is missing that the format needs."""
    if format == 'onnx':
        pytest.importorskip('onnx')
        pytest.importorskip('onnxruntime')


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
