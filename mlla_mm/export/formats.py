# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The formats that models are written in: TorchScript, ONNX and torch.export."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..compat import pytorch
from ..utils.text import describe_error
from .errors import ExportError
from .parts import Part

MIN_SIDE = 33
"""Smallest image side of a torch-export program.

Smaller images leave the last stage one pixel, and PyTorch makes another program of it.
"""

OPSETS = range(17, 21)
"""Opsets that ONNX files can have.

17 is the first one with LayerNormalization, and 16 was the first whose RoIAlign is
mmdet's. 20 is the last one that PyTorch's exporter by traces writes.
"""

METADATA = 'metadata.json'
"""Name of the metadata within TorchScript files and torch-export programs."""

Runner = Callable[..., Sequence[Tensor]]
"""Runs an exported file: it turns images, and values of the settings, into outputs."""


class Options(NamedTuple):
    """How a file is written.

    Attributes:
        shape (tuple[int, int]): Image height and width to trace with.
            Defaults to (224, 224).
        opset (int): Opset of an ONNX file. Defaults to 17.
        int8 (bool): Whether the linear layers of an ONNX file are quantised. Then their
            weights are int8, with a scale for each output, and their inputs become
            8-bit integers as the file runs. Defaults to False.
    """

    shape: Tuple[int, int] = (224, 224)
    opset: int = 17
    int8: bool = False


def example_inputs(part: Part, batch: int, height: int, width: int) -> List[Tensor]:
    """Inputs of a part: noise, the same in every call.

    Args:
        part (Part): The part.
        batch (int): Number of images. A detector gets one.
        height (int): In pixels.
        width (int): In pixels.

    Returns:
        list[Tensor]: Images (N, C, H, W), and the usual values of the settings.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1 if part.is_detector else batch, part.in_channels, height, width)
    if part.metadata.get('normalization') == 'inside':
        images = torch.randint(0, 256, shape, generator=generator).float()
    else:
        images = torch.randn(shape, generator=generator)
    device = next(part.module.parameters()).device
    return [images.to(device), *(x.to(device) for x in part.settings.values())]


def require_support(format: str, options: Options) -> None:
    """Refuse a format that cannot be written.

    Raises:
        ExportError: If the format or the opset is unknown, if the format needs a
            package or a newer PyTorch, if the shape is too small, or if int8 is wanted
            in another format than onnx.
    """
    if format not in FORMATS:
        raise ExportError(f'Unknown format {format!r}: choose from {list(FORMATS)}.')
    if min(options.shape) < MIN_SIDE:
        raise ExportError(
            f'shape must be at least {MIN_SIDE} x {MIN_SIDE}, got {options.shape}.'
        )
    if format == 'torch-export' and not pytorch.TELLS_EXPORT:
        raise ExportError(
            f'torch-export needs PyTorch 2.7, and this is {torch.__version__}. Choose '
            'torchscript or onnx.'
        )
    if format == 'onnx':
        if options.opset not in OPSETS:
            raise ExportError(
                f'opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {options.opset}.'
            )
        require_packages('onnx', 'onnxruntime')
    elif options.int8:
        raise ExportError(f'int8 is an option of onnx, and the format is {format}.')


def require_packages(*names: str) -> None:
    """Refuse if packages are missing.

    Raises:
        ExportError: If one of the packages is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"onnx needs {', '.join(missing)}: pip install -e '.[export]'. With the "
            "original OpenMMLab packages, install '.[openmmlab,export]', which keeps "
            'NumPy below 2.'
        )


def write(part: Part, format: str, path: Path, options: Options) -> None:
    """Write a part to a file.

    Raises:
        ExportError: If PyTorch cannot export it, or if the format is not for it.
    """
    if format == 'torch-export' and part.is_detector:
        raise ExportError(
            'torch-export makes a program of a detector that takes few image sizes '
            'only. Choose torchscript or onnx.'
        )
    writer, _ = _FORMATS[format]
    with torch.no_grad(), warnings.catch_warnings():
        # Tracers warn of possible mistakes. The comparison finds actual ones.
        warnings.simplefilter('ignore')
        try:
            writer(part, example_inputs(part, 2, *options.shape), path, options)
        except Exception as error:  # exporters raise errors of many types
            raise ExportError(
                f'PyTorch {torch.__version__} cannot export this model to {format}: '
                f'{describe_error(error)}'
            ) from error


def load(format: str, path: Path, device: torch.device) -> Runner:
    """Load what :func:`write` has written.

    Args:
        format (str): Its format.
        path (Path): The file.
        device (torch.device): Where TorchScript and torch-export programs run.

    Returns:
        Callable: Runs the file. It takes inputs on any device and gives outputs on the
        CPU.
    """
    run = _FORMATS[format][1](path)
    return lambda *inputs: [x.cpu() for x in run(*(x.to(device) for x in inputs))]


def _write_torchscript(
    part: Part, inputs: List[Tensor], path: Path, options: Options
) -> None:
    script = torch.jit.trace(part.module, tuple(inputs), check_trace=False)
    torch.jit.save(script, str(path), _extra_files=_extra_files(part))


def _write_program(
    part: Part, inputs: List[Tensor], path: Path, options: Options
) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    side = dynamic(min=MIN_SIDE)
    # A program whose output has any size would ask whether it is the input's.
    program = torch.export.export(
        part.module,
        (inputs[0],),
        dynamic_shapes=({0: dynamic, 2: side, 3: side},),
        strict=False,
    )
    torch.export.save(program, str(path), extra_files=_extra_files(part))


def _write_onnx(part: Part, inputs: List[Tensor], path: Path, options: Options) -> None:
    import onnx

    axes = {2: 'height', 3: 'width', **({} if part.is_detector else {0: 'batch'})}
    torch.onnx.export(
        part.module,
        tuple(inputs),
        str(path),
        opset_version=options.opset,
        input_names=['images', *part.settings],
        output_names=list(part.outputs),
        dynamic_axes={'images': axes, **part.outputs},
        # The exporter by torch.export is slow, and for detectors it is wrong at other
        # sizes than the one that it has seen.
        **pytorch.ONNX_BY_TRACE,
    )
    file = onnx.load(str(path))
    for name, value in part.settings.items():
        # An input with a value of its own may be left out.
        usual = onnx.numpy_helper.from_array(value.numpy(), name)
        file.graph.initializer.append(usual)
    onnx.helper.set_model_props(file, texts(part.metadata))
    onnx.save(file, str(path))


def quantize(path: Path, out: Path) -> None:
    """Quantise the linear layers of an ONNX file, as :class:`Options` says."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    log = logging.getLogger()
    level = log.level
    try:
        # It asks for a step that shortens names of shapes, and changes nothing here.
        log.setLevel(logging.ERROR)
        quantize_dynamic(
            path,
            out,
            op_types_to_quantize=['MatMul', 'Gemm'],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        log.setLevel(level)


def _extra_files(part: Part) -> Dict[str, str]:
    return {METADATA: json.dumps(texts(part.metadata), indent=2)}


def texts(metadata: Mapping[str, Any]) -> Dict[str, str]:
    """Metadata as ONNX has them: texts, and those of all but texts are JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }


def _load_program(path: Path) -> Runner:
    module = torch.export.load(str(path)).module()
    return lambda images, *_: module(images)


def torchscript_runner(path: Path) -> Tuple[Runner, Dict[str, str]]:
    """Open a TorchScript file, on the device that it was exported on.

    Returns:
        tuple[Callable, dict[str, str]]: What runs the file, and its metadata.

    Raises:
        ExportError: If PyTorch cannot read the file.
    """
    found: Dict[str, Any] = {METADATA: ''}
    with suppress(ImportError):
        import torchvision  # noqa: F401  (registers a detector's operators)
    try:
        run = torch.jit.load(str(path), _extra_files=found)
    except RuntimeError as error:
        raise ExportError(
            f'{path} cannot be read as TorchScript: {describe_error(error)}'
        ) from error
    return run, json.loads(found[METADATA] or '{}')


def onnx_runner(
    path: Path, device: Optional[str] = None, threads: Optional[int] = None
) -> Tuple[Runner, List[str], Dict[str, str]]:
    """Open an ONNX file.

    Args:
        path (Path): The file.
        device (str, optional): 'cpu', or 'cuda' with or without a number. None takes
            CUDA if the installed onnxruntime has it. Defaults to None.
        threads (int, optional): Number of CPU threads. Defaults to None: as many as
            onnxruntime likes.

    Returns:
        tuple[Callable, list[str], dict[str, str]]: What runs the file, the names of its
        outputs, and its metadata.

    Raises:
        ExportError: If onnxruntime is missing, if it has not the device, or if it
            cannot read the file.
    """
    require_packages('onnxruntime')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Errors alone: it warns of inputs that may be left out.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = _providers(device, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers)
    except Exception as error:  # it raises errors of its own types
        raise ExportError(
            f'onnxruntime cannot read {path}: {describe_error(error)}'
        ) from error

    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    input_names = [x.name for x in inputs]

    def run(*values: Tensor) -> List[Tensor]:
        feed = {name: x.cpu().numpy() for name, x in zip(input_names, values)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    names = [output.name for output in session.get_outputs()]
    return run, names, session.get_modelmeta().custom_metadata_map


def _providers(device: Optional[str], available: Sequence[str]) -> List[Any]:
    """What onnxruntime runs a file by, the first choice first."""
    kind = None if device is None else torch.device(device)
    cuda, cpu = 'CUDAExecutionProvider', 'CPUExecutionProvider'
    if kind is not None and kind.type != 'cpu':
        if kind.type != 'cuda' or cuda not in available:
            raise ExportError(
                f"Device '{device}' cannot be used: the installed onnxruntime has "
                f'{", ".join(available)}. For CUDA install onnxruntime-gpu.'
            )
    if cuda not in available or (kind is not None and kind.type == 'cpu'):
        return [cpu]
    number = None if kind is None else kind.index
    if number is None:  # of several processes, each has its own
        number = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return [(cuda, dict(device_id=number)), cpu]


_Writer = Callable[[Part, List[Tensor], Path, Options], None]
_FORMATS: Dict[str, Tuple[_Writer, Callable[[Path], Runner]]] = {
    'torchscript': (_write_torchscript, lambda path: torchscript_runner(path)[0]),
    'onnx': (_write_onnx, lambda path: onnx_runner(path)[0]),
    'torch-export': (_write_program, _load_program),
}

FORMATS = {'torchscript': '.pt', 'onnx': '.onnx', 'torch-export': '.pt2'}
"""The formats and their usual suffixes."""
