# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Export: models as files that run without this package."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ..compat import pytorch
from ..models import LinearAttentionSwin
from ..models.layers import LinearAttention

TOLERANCE = 1e-4
"""Largest difference to eager execution, relative to the largest output."""

MIN_SIDE = 33
"""Smallest image side of a torch-export program.

Smaller images leave the last stage one pixel, and PyTorch makes another program of it.
"""

Runner = Callable[[Tensor], Sequence[Tensor]]
"""Runs an exported file: it turns images into the outputs."""


class ExportError(ValueError):
    """A model cannot be exported. The message says why, and what to do."""


class Part(NamedTuple):
    """A part of a model to export.

    Attributes:
        module (nn.Module): Turns normalised images (N, in_channels, H, W) into a tuple
            of tensors.
        in_channels (int): Number of image channels.
        outputs (tuple[str]): Names of the outputs.
    """

    module: nn.Module
    in_channels: int
    outputs: Tuple[str, ...]


class _Logits(nn.Module):
    """A classifier that returns a tuple, as backbones do."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tuple[Tensor]:
        # mmpretrain's classifiers, too, return logits if images are all they get.
        return (self.classifier(images),)


def select_part(model: nn.Module, part: str) -> Part:
    """Select what to export of a model.

    Args:
        model (nn.Module): A model in evaluation mode, from
            :func:`mlla_mm.apis.load_model` or :func:`mlla_mm.get_model`.
        part (str): 'backbone' for the feature maps ``stage0``, ``stage1`` and so on, or
            'classifier' for ``logits``.

    Raises:
        ExportError: If the model has no such part.
    """
    backbone: Any = getattr(model, 'backbone', model)
    if part == 'backbone':
        names = tuple(f'stage{i}' for i in backbone.out_indices)
        return Part(backbone, backbone.in_channels, names)
    if not hasattr(model, 'head'):
        raise ExportError(
            f'{type(model).__name__} is not a classifier, and heads of other tasks do '
            "not export. Export its backbone with part 'backbone'."
        )
    return Part(_Logits(model), backbone.in_channels, ('logits',))


def export_model(
    part: Part,
    format: str,
    path: Union[str, Path],
    shape: Tuple[int, int] = (224, 224),
) -> float:
    """Write a model to a file, and compare the file with eager execution.

    The file takes any batch and image size. It is compared at other sizes than the one
    that it was traced with. Its input ``images`` is what the network takes: RGB,
    normalised by the mean and standard deviation of the config. TorchScript and
    torch-export programs run on the device that the model is on now.

    Args:
        part (Part): What to export, in evaluation mode.
        format (str): 'torchscript', 'onnx' or 'torch-export'.
        path (str | Path): File to write.
        shape (tuple[int, int]): Image height and width to trace with.
            Defaults to (224, 224).

    Returns:
        float: Largest difference to eager execution, divided by the largest output.

    Raises:
        ExportError: If the format is unknown, if it needs a package or a newer PyTorch,
            if the path is a folder, if the model cannot be exported, or if the outputs
            of the file differ by more than :data:`TOLERANCE`. Then there is no file.
    """
    _require_support(format, shape)
    _require_exportable(part.module)
    write, load = _FORMATS[format]
    path = Path(path)
    if path.is_dir():
        raise ExportError(f'{path} is a folder: give the path of a file.')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Tracers warn of possible mistakes. The comparison finds actual ones.
            warnings.simplefilter('ignore')
            try:
                write(part, _random_images(part, 2, *shape), path)
            except Exception as error:  # exporters raise errors of many types
                raise ExportError(
                    f'PyTorch {torch.__version__} cannot export this model to {format}:'
                    f' {type(error).__name__}: {error}'
                ) from error
            return _largest_difference(part, load(path), shape)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _require_support(format: str, shape: Tuple[int, int]) -> None:
    if format not in _FORMATS:
        raise ExportError(f'Unknown format {format!r}: choose from {list(_FORMATS)}.')
    if min(shape) < MIN_SIDE:
        raise ExportError(
            f'shape must be at least {MIN_SIDE} x {MIN_SIDE}, got {shape}.'
        )
    if format == 'torch-export' and not pytorch.TELLS_EXPORT:
        raise ExportError(
            f'torch-export needs PyTorch 2.7, and this is {torch.__version__}. Choose '
            'torchscript or onnx.'
        )
    if format == 'onnx':
        packages = ['onnx', 'onnxruntime']
        if pytorch.EXPORTS_ONNX_THROUGH_EXPORT:
            packages.append('onnxscript')
        missing = [name for name in packages if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"onnx needs {', '.join(missing)}: pip install -e '.[export]'. With "
                "the original OpenMMLab packages, install '.[openmmlab,export]', which "
                'keeps NumPy below 2.'
            )


def _require_exportable(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LinearAttention) and module.A_log is not None:
            raise ExportError(
                'The recurrence of the forget gate runs token by token, and an '
                'exported file takes any number of tokens. Export a model with '
                'forget_gate=False.'
            )
        if isinstance(module, LinearAttentionSwin) and module.ape is not None:
            raise ExportError(
                f'ape = {module.ape} names the only image size of this model, and an '
                'exported file takes any size. Export a model without ape.'
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
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    options: Dict[str, Any] = dict(
        input_names=['images'], output_names=list(part.outputs)
    )
    if pytorch.EXPORTS_ONNX_THROUGH_EXPORT:
        # The weights go into the same file.
        options.update(dynamo=True, external_data=False, verbose=False)
        options['dynamic_shapes'] = (axes,)
    else:
        # 17 is the first opset with LayerNormalization.
        options['opset_version'] = 17
        options['dynamic_axes'] = dict(images=axes)
        for name in part.outputs:
            sides = {2: f'{name}_height', 3: f'{name}_width'}
            options['dynamic_axes'][name] = {
                0: 'batch',
                **({} if name == 'logits' else sides),
            }
    torch.onnx.export(part.module, (images,), str(path), **options)


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


def _largest_difference(part: Part, run: Runner, shape: Tuple[int, int]) -> float:
    """Compare at a larger and at a smaller size, both with odd sides."""
    height, width = shape
    largest = 0.0
    for batch, size in (
        (1, (height + 45, width + 26)),
        (3, (max(MIN_SIDE, height // 2 + 1), max(MIN_SIDE, width - 7))),
    ):
        images = _random_images(part, batch, *size)
        for name, expected, actual in zip(
            part.outputs, part.module(images), run(images)
        ):
            difference = float('inf')
            if actual.shape == expected.shape:
                error = (actual.cpu() - expected.cpu()).abs().max()
                difference = float(error / expected.cpu().abs().max())
            if not difference <= TOLERANCE:  # so that NaN is refused, too
                raise ExportError(
                    f"The exported model's {name} for {tuple(images.shape)} differs by "
                    f'{difference:.1e} of the largest value. At most {TOLERANCE:.0e} '
                    'is allowed.'
                )
            largest = max(largest, difference)
    return largest


def _random_images(part: Part, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, part.in_channels, height, width, generator=generator)
    return images.to(next(part.module.parameters()).device)
