# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Models as files that run without this package, for any batch and image size."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ..compat import pytorch

TOLERANCE = 1e-4
"""Largest difference to eager execution, relative to the largest output."""

MIN_SIDE = 33
"""Least image side of a torch-export program.

At smaller ones the last stage has a side of 1, and that is another program.
"""

Runner = Callable[[Tensor], Sequence[Tensor]]
"""Runs an exported file: images to the outputs."""


class ExportError(ValueError):
    """A model cannot be exported; the message says why, and what to do."""


class Part(NamedTuple):
    """A part of a model to export.

    Attributes:
        module (nn.Module): Takes normalised images (N, in_channels, H, W), returns a
            tuple of tensors.
        in_channels (int): Number of image channels.
        outputs (tuple[str]): Names of the outputs.
    """

    module: nn.Module
    in_channels: int
    outputs: Tuple[str, ...]


class _Logits(nn.Module):
    """A classifier from images to a tuple, as backbones return it."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tuple[Tensor]:
        # Images alone mean logits to mmpretrain's classifiers too.
        return (self.classifier(images),)


def select_part(model: nn.Module, part: str) -> Part:
    """Select what to export of a model.

    Args:
        model (nn.Module): What :func:`mlla_mm.apis.load_model` or
            :func:`mlla_mm.get_model` returned, in evaluation mode.
        part (str): 'backbone', from images to the feature maps ``stage0``, ...; or
            'classifier', to ``logits``.

    Raises:
        ExportError: If the model has no such part.
    """
    backbone = getattr(model, 'backbone', model)
    if part == 'backbone':
        names = tuple(f'stage{i}' for i in backbone.out_indices)
        return Part(backbone, backbone.in_channels, names)
    if not hasattr(model, 'head'):
        raise ExportError(
            f'{type(model).__name__} is no classifier, and heads of other tasks do not '
            "export. Export its backbone, part 'backbone'."
        )
    return Part(_Logits(model), backbone.in_channels, ('logits',))


def export_model(
    part: Part,
    format: str,
    path: Union[str, Path],
    shape: Tuple[int, int] = (224, 224),
) -> float:
    """Write a model as a file and compare that with eager execution.

    The file takes any batch and image size, and is checked at others than those that
    it was made with. Its input ``images`` is what the network takes: RGB, scaled to the
    mean and standard deviation of the config. TorchScript and torch-export programs run
    on the device that the model is on now.

    Args:
        part (Part): What to export, in evaluation mode.
        format (str): 'torchscript', 'onnx' or 'torch-export'.
        path (str | Path): File to write.
        shape (tuple[int, int]): Image height and width to trace with.
            Defaults to (224, 224).

    Returns:
        float: Largest difference to eager execution over the largest output.

    Raises:
        ExportError: If the format is unknown, needs a package or a PyTorch that is not
            there, if the model does not export, or if the file's outputs differ by more
            than :data:`TOLERANCE`; no file is left then.
    """
    _check_arguments(format, shape)
    write, load = _FORMATS[format]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _removed_on_error(path), torch.no_grad(), warnings.catch_warnings():
        # Tracers warn of what may go wrong; the comparison tells whether it does.
        warnings.simplefilter('ignore')
        try:
            write(part, _images(part, 2, *shape), path)
        except Exception as error:  # exporters raise errors of all types
            raise ExportError(
                f'PyTorch {torch.__version__} cannot export this model to {format}: '
                f'{type(error).__name__}: {error}'
            ) from error
        error = _largest_error(part, load(path), shape)
    return error


def _check_arguments(format: str, shape: Tuple[int, int]) -> None:
    if format not in _FORMATS:
        raise ExportError(f'Unknown format {format!r}: choose from {list(_FORMATS)}.')
    if min(shape) < MIN_SIDE:
        raise ExportError(f'shape must be at least {MIN_SIDE} x {MIN_SIDE}: {shape}.')
    if format == 'torch-export' and not pytorch.TELLS_EXPORT:
        raise ExportError(
            f'torch-export needs PyTorch 2.7, this is {torch.__version__}. '
            'torchscript and onnx do without.'
        )
    if format == 'onnx':
        packages = ['onnx', 'onnxruntime']
        if pytorch.EXPORTS_ONNX_THROUGH_EXPORT:
            packages.append('onnxscript')
        missing = [name for name in packages if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"onnx needs {', '.join(missing)}: pip install -e '.[export]', or "
                "'.[openmmlab,export]' with the original OpenMMLab packages, whose "
                'NumPy has to stay below 2.'
            )


def _write_torchscript(part: Part, images: Tensor, path: Path) -> None:
    torch.jit.trace(part.module, images, check_trace=False).save(str(path))


def _write_program(part: Part, images: Tensor, path: Path) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    side = dynamic(min=MIN_SIDE)
    program = torch.export.export(
        part.module,
        (images,),
        dynamic_shapes=({0: dynamic, 2: side, 3: side},),
        strict=False,
    )
    torch.export.save(program, str(path))


def _write_onnx(part: Part, images: Tensor, path: Path) -> None:
    names = dict(input_names=['images'], output_names=list(part.outputs))
    if pytorch.EXPORTS_ONNX_THROUGH_EXPORT:
        torch.onnx.export(
            part.module,
            (images,),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: 'batch', 2: 'height', 3: 'width'},),
            # Weights in the same file.
            external_data=False,
            verbose=False,
            **names,
        )
        return
    axes = {'images': {0: 'batch', 2: 'height', 3: 'width'}}
    for name in part.outputs:
        axes[name] = {0: 'batch'}
        if name != 'logits':
            axes[name].update({2: f'{name}_height', 3: f'{name}_width'})
    # 17 is the first opset with LayerNormalization.
    torch.onnx.export(
        part.module, (images,), str(path), dynamic_axes=axes, opset_version=17, **names
    )


def _load_program(path: Path) -> Runner:
    return torch.export.load(str(path)).module()


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider']
    )

    def run(images: Tensor) -> List[Tensor]:
        outputs = session.run(None, {'images': images.cpu().numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return run


_FORMATS: Dict[str, Tuple[Callable[[Part, Tensor, Path], None], Callable]] = {
    'torchscript': (_write_torchscript, lambda path: torch.jit.load(str(path))),
    'onnx': (_write_onnx, _load_onnx),
    'torch-export': (_write_program, _load_program),
}

FORMATS = {'torchscript': '.pt', 'onnx': '.onnx', 'torch-export': '.pt2'}
"""The formats and their usual suffixes."""


def _largest_error(part: Part, run: Runner, shape: Tuple[int, int]) -> float:
    """Compare at a larger and a smaller size, both with odd sides."""
    height, width = shape
    largest = 0.0
    for batch, size in (
        (1, (height + 45, width + 26)),
        (3, (max(MIN_SIDE, height // 2 + 1), max(MIN_SIDE, width - 7))),
    ):
        images = _images(part, batch, *size)
        for name, expected, actual in zip(
            part.outputs, part.module(images), run(images)
        ):
            error = _relative_error(actual.cpu(), expected.cpu())
            if not error <= TOLERANCE:  # so that NaN is none
                raise ExportError(
                    f"The exported model's {name} for {tuple(images.shape)} differs by "
                    f'{error:.1e} of the largest value; {TOLERANCE:.0e} is allowed.'
                )
            largest = max(largest, error)
    return largest


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float('inf')
    return float((actual - expected).abs().max() / expected.abs().max())


def _images(part: Part, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, part.in_channels, height, width, generator=generator)
    return images.to(next(part.module.parameters()).device)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
