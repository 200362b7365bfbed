# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Time of each Triton kernel at MLLA-T's stages, and profiles of whole models.

Kernels are timed in CUDA graphs, without the time of the host. A pass is the time of
reading or writing the map of the stage, of C channels, at the speed of a copy. Without
a GPU the kernels are interpreted, on tiny maps: the times then mean nothing.
"""

import argparse
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections import defaultdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

GPU = torch.cuda.is_available()
if not GPU:  # before the kernels are imported
    os.environ['TRITON_INTERPRET'] = '1'
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import mlla_mm  # noqa: E402, F401  (before anything imports mmcv.ops)
from benchmarks.cases import MODES, Case  # noqa: E402
from benchmarks.meter import Meter, format_settings  # noqa: E402
from benchmarks.races import make_call, prepare_model  # noqa: E402
from mlla_mm.models.layers import MLLABlock  # noqa: E402
from mlla_mm.ops.triton import _block as block_kernels  # noqa: E402
from mlla_mm.ops.triton import _depthwise_conv as depthwise  # noqa: E402
from mlla_mm.ops.triton import _layer_norm as norm  # noqa: E402
from mlla_mm.ops.triton import _linear as linear  # noqa: E402
from mlla_mm.ops.triton import _merging as merging  # noqa: E402
from mlla_mm.ops.triton import _mlla_attention as attention  # noqa: E402
from mlla_mm.ops.triton import _norm_linear as norm_linear  # noqa: E402
from mlla_mm.ops.triton import _sums as sums  # noqa: E402

METER = Meter(repeats=5 if GPU else 1)
DEVICE = METER.device
DTYPE = torch.bfloat16
EPS = 1e-5
HEAD_DIMS = 32
# Channels and side of the square maps of MLLA-T for images of 224x224.
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7)) if GPU else ((32, 4), (64, 2)) * 2
BATCH = 128 if GPU else 2
IMAGE_SIZE = 224 if GPU else 64
# Calls of a model before its time is measured, and under the profiler.
WARM_UPS, PROFILED = (3, 2) if GPU else (1, 1)
MODELS = ('mlla-t', 'fused-t', 'plain-t') if GPU else ('mlla-t', 'plain-t')


# --- The kernels ---


class Stage:
    """Makes random inputs of kernels.

    Args:
        channels (int): Number of channels C.
        side (int): Height and width of the maps.
        batch (int): Number of maps N.
    """

    def __init__(self, channels: int, side: int, batch: int) -> None:
        self.channels = channels
        self.heads = channels // HEAD_DIMS
        self.shape = (batch, side, side)
        self.num_bytes = batch * side**2 * channels * DTYPE.itemsize

    def map(self, width: int = 1) -> Tensor:
        """A map (N, H, W, width * C)."""
        shape = (*self.shape, self.channels * width)
        return torch.randn(shape, device=DEVICE).to(DTYPE)

    def maps(self, number: int) -> List[Tensor]:
        """Several maps (N, H, W, C)."""
        return [self.map() for _ in range(number)]

    def rows(self, width: int = 1) -> Tensor:
        """A map as a matrix (N * H * W, width * C)."""
        return self.map(width).view(-1, self.channels * width)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """A weight (rows * C, columns * C)."""
        shape = (rows * self.channels, columns * self.channels)
        return torch.randn(shape, device=DEVICE).to(DTYPE) / 8

    def vector(self, width: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """A bias (width * C,)."""
        return torch.randn(self.channels * width, device=DEVICE).to(dtype)

    def taps(self) -> Tuple[Tensor, Tensor]:
        """Weight and bias of a 3x3 depthwise convolution."""
        taps = torch.randn(self.channels, 1, 3, 3, device=DEVICE) / 3
        return taps, self.vector()


class Kernel(NamedTuple):
    """A row of the table.

    Attributes:
        inputs (Callable): Makes the arguments of the calls from a :class:`Stage`.
        call (Callable): The call of our kernel.
        reference (Callable, optional): PyTorch's operators for the same, or several of
            our kernels. None if they are not worth comparing.
        most_channels (float): Stages of more channels are left out.
    """

    inputs: Callable[[Stage], Sequence[Any]]
    call: Callable[..., object]
    reference: Optional[Callable[..., object]] = None
    most_channels: float = math.inf


def _norm_inputs(s: Stage) -> Sequence[Any]:
    weight, bias = s.vector(), s.vector()
    return s.map(), weight, bias, weight.to(DTYPE), bias.to(DTYPE)


def _attention_grad_inputs(s: Stage) -> Sequence[Any]:
    qk, v, grad = s.map(2), s.map(), s.map()
    y, states = attention.linear_attention(qk, v, s.heads)
    return qk, v, y, states, grad, s.heads


def _gelu_linear_grad_by_pytorch(
    grad: Tensor, weight: Tensor, hidden: Tensor
) -> object:
    grad_hidden = torch.ops.aten.gelu_backward(grad @ weight, hidden)
    return grad_hidden, F.gelu(hidden), grad_hidden.sum(0)


def _norm_and_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    u = norm.layer_norm(x, norm_weight, norm_bias, eps, DTYPE)
    return F.linear(u, weight, bias)


def _mlp_in_parts(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Optional[Tensor],
    keep: bool,
) -> Tensor:
    u = norm.layer_norm(x, norm_weight, norm_bias, eps, DTYPE).view(-1, x.shape[-1])
    activated, _ = linear.linear_gelu(u, weight1, bias1, keep)
    return linear.linear_residual(activated, weight2, bias2, x, scale)


def _mlp_inputs(s: Stage, keep: bool) -> Sequence[Any]:
    layers = s.matrix(4, 1), s.vector(4, DTYPE), s.matrix(1, 4), s.vector(dtype=DTYPE)
    return s.map(), s.vector(), s.vector(), EPS, *layers, None, keep


def _halve_by_pytorch(h: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    maps, taps = h.permute(0, 3, 1, 2), taps.to(DTYPE)
    options = dict(stride=2, padding=1, groups=len(taps))
    return F.conv2d(maps, taps, bias.to(DTYPE), **options).relu_()


def _halve_grad_inputs(s: Stage) -> Sequence[Any]:
    h, (taps, bias) = s.map(), s.taps()
    y = merging.halve(h, taps, bias)
    return h, taps, y, torch.randn_like(y)


# fc1 and fc2 are the linear layers of the MLP.
KERNELS = dict(
    conv_residual=Kernel(
        lambda s: (s.map(), *s.taps()),
        partial(depthwise.conv, residual=True),
    ),
    # The input is a half of a wider map, as in the block.
    conv_silu=Kernel(
        lambda s: (s.map(2)[..., : s.channels], *s.taps()),
        partial(depthwise.conv, act=True),
    ),
    silu_conv_grad=Kernel(
        lambda s: (s.map(), *s.taps(), s.map()),
        depthwise.silu_conv_grad,
    ),
    conv_grad=Kernel(
        lambda s: (s.map(), s.taps()[0], s.map()),
        partial(depthwise.conv_grad, residual=True),
    ),
    # The last two inputs are what is added, and the gate.
    gated_conv=Kernel(
        lambda s: (s.map(), *s.taps(), *s.maps(2)),
        depthwise.gated_conv,
    ),
    # The last four are the same, and the gradients of the output and of the gate.
    gated_conv_grad=Kernel(
        lambda s: (s.map(), *s.taps(), *s.maps(4)),
        depthwise.gated_conv_grad,
    ),
    layer_norm=Kernel(
        _norm_inputs,
        lambda x, w, b, half_w, half_b: norm.layer_norm(x, w, b, EPS, DTYPE),
        lambda x, w, b, half_w, half_b: F.layer_norm(x, w.shape, half_w, half_b, EPS),
    ),
    # The maps are the gradient of the output, and the gradient of a residual.
    layer_norm_grad=Kernel(
        lambda s: (s.map(), s.vector(), s.vector(), EPS, *s.maps(2)),
        norm.layer_norm_residual_grad,
    ),
    # The convolution with its residual, and LayerNorm, in one kernel and in two.
    conv_norm=Kernel(
        lambda s: (s.map(), *s.taps(), s.vector(), s.vector(), EPS, DTYPE),
        depthwise.conv_norm,
        partial(block_kernels.conv_and_norm, merged=False),
    ),
    linear_attention=Kernel(
        lambda s: (s.map(2), s.map(), s.heads),
        attention.linear_attention,
    ),
    linear_attention_grad=Kernel(
        _attention_grad_inputs,
        attention.linear_attention_grad,
    ),
    # fc1 in inference, and in training, where its output is kept.
    linear_gelu=Kernel(
        lambda s: (s.rows(), s.matrix(4, 1), s.vector(4, DTYPE)),
        lambda x, w, b: linear.linear_gelu(x, w, b, False),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
    ),
    linear_gelu_keep=Kernel(
        lambda s: (s.rows(), s.matrix(4, 1), s.vector(4, DTYPE)),
        lambda x, w, b: linear.linear_gelu(x, w, b, True),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
    ),
    # fc2, and the projection of attention's output.
    linear_residual=Kernel(
        lambda s: (s.rows(4), s.matrix(1, 4), s.vector(dtype=DTYPE), s.map()),
        linear.linear_residual,
        lambda x, w, b, residual: residual.flatten(0, 2) + F.linear(x, w, b),
    ),
    linear_residual_out=Kernel(
        lambda s: (s.rows(), s.matrix(1, 1), s.vector(dtype=DTYPE), s.map()),
        linear.linear_residual,
        lambda x, w, b, residual: residual.flatten(0, 2) + F.linear(x, w, b),
    ),
    # Back through fc2 and GELU.
    gelu_linear_grad=Kernel(
        lambda s: (s.rows(), s.matrix(1, 4), s.rows(4)),
        linear.gelu_linear_grad,
        _gelu_linear_grad_by_pytorch,
    ),
    # The gradient of fc1's weight, a matrix product of PyTorch's.
    weight_grad=Kernel(
        lambda s: (s.rows(4), s.rows(), s.matrix(4, 1).float()),
        linear.weight_grad,
        lambda grad, x, like: grad.t() @ x,
    ),
    # In one kernel for few channels, and in parts.
    norm_linear=Kernel(
        lambda s: (
            *(s.map(), s.vector(), s.vector(), EPS),
            *(s.matrix(2, 1), s.vector(2, DTYPE)),
        ),
        norm_linear.norm_linear,
        _norm_and_linear,
        norm_linear.MAX_CHANNELS,
    ),
    mlp=Kernel(
        partial(_mlp_inputs, keep=False),
        norm_linear.mlp,
        _mlp_in_parts,
        norm_linear.MAX_CHANNELS,
    ),
    mlp_keep=Kernel(
        partial(_mlp_inputs, keep=True),
        norm_linear.mlp,
        _mlp_in_parts,
        norm_linear.MAX_CHANNELS,
    ),
    # Of patch merging, on a map of C channels instead of 8 C.
    halve=Kernel(
        lambda s: (s.map().relu_(), *s.taps()), merging.halve, _halve_by_pytorch
    ),
    halve_grad=Kernel(_halve_grad_inputs, merging.halve_grad),
    column_sums=Kernel(
        lambda s: (s.rows(2),),
        sums.column_sums,
        lambda x: x.sum(0),
    ),
    # PyTorch's, for comparison: C to 2 C channels, and an addition of three passes.
    product=Kernel(
        lambda s: (s.rows(), s.matrix(2, 1), s.vector(2, DTYPE)),
        F.linear,
    ),
    add=Kernel(lambda s: s.maps(2), torch.add),
)


def warm(number: int) -> None:
    """Compile the kernels of a stage. Their code does not depend on the batch size.

    Args:
        number (int): The stage, 0 to 3.
    """
    channels, side = STAGES[number]
    stage = Stage(channels, side, 2)
    with torch.no_grad():
        for kernel in KERNELS.values():
            if channels <= kernel.most_channels:
                kernel.call(*kernel.inputs(stage))
    block = MLLABlock(channels, stage.heads).to(DEVICE)
    x = stage.map().requires_grad_()
    for mode in MODES:
        make_call(block, x, Case('block', (side, side), 2, mode, 'bfloat16'))()
    METER.synchronize()


def measure_kernels(bandwidth: float, deadline: float) -> Tuple[List[dict], List[str]]:
    """Time every kernel at every stage.

    Args:
        bandwidth (float): Bytes per second of a copy.
        deadline (float): When to stop, as of ``time.monotonic``.

    Returns:
        tuple[list[dict], list[str]]: A row for each kernel and stage, and the lines of
        the printed table.
    """
    rows: List[dict] = []
    lines: List[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    for number, (channels, side) in enumerate(STAGES):
        stage = Stage(channels, side, BATCH)
        tell(f'\nStage {number}: {BATCH} x {side} x {side} x {channels}, {DTYPE}')
        tell(f'{"kernel":24s}{"us":>10s}{"passes":>10s}{"PyTorch us":>12s}')
        for name, kernel in KERNELS.items():
            if channels > kernel.most_channels:
                continue
            if time.monotonic() > deadline:
                tell('Out of time')
                return rows, lines
            row: Dict[str, Any] = dict(
                kernel=name, stage=number, channels=channels, side=side
            )
            rows.append(row)
            other = ''
            try:
                with torch.no_grad():
                    inputs = kernel.inputs(stage)
                    row['us'] = METER.graph_microseconds(partial(kernel.call, *inputs))
                    if kernel.reference is not None:
                        reference = partial(kernel.reference, *inputs)
                        row['pytorch_us'] = METER.graph_microseconds(reference)
                        other = f'{row["pytorch_us"]:12.1f}'
            except Exception as error:
                traceback.print_exc()
                row['error'] = f'{type(error).__name__}: {error}'[:300]
                tell(f'{name:24s} FAIL {row["error"]}'.replace('\n', ' '))
                continue
            row['passes'] = row['us'] * 1e-6 * bandwidth / stage.num_bytes
            tell(f'{name:24s}{row["us"]:10.1f}{row["passes"]:10.1f}{other}')
    return rows, lines


# --- Whole models ---


def profile_model(name: str, mode: str) -> Tuple[dict, List[str]]:
    """Time, launches and memory of a call of a model, and its kernels by name.

    Args:
        name (str): One of :data:`benchmarks.models.MODELS`.
        mode (str): One of :data:`benchmarks.cases.MODES`.

    Returns:
        tuple[dict, list[str]]: The numbers, and the lines of the printed table.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    case = Case('classification', size, BATCH, mode, 'bfloat16')
    model = prepare_model(name, case, DEVICE)
    call = make_call(model, torch.randn(BATCH, 3, *size, device=DEVICE), case)
    for _ in range(WARM_UPS):
        call()
    peak = METER.peak_bytes(call) / 2**20 if GPU else None
    elapsed, host = METER.milliseconds(call)
    activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        for _ in range(PROFILED):
            call()
        METER.synchronize()
    kind = getattr(torch.autograd.DeviceType, DEVICE.type.upper())
    times: Dict[str, List[float]] = defaultdict(list)
    for event in recorded.events():
        if event.device_type == kind:
            times[event.name].append(
                event.self_device_time_total if GPU else event.self_cpu_time_total
            )
    rows = [
        dict(name=key, launches=len(found) / PROFILED, us=sum(found) / PROFILED)
        for key, found in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    found = dict(
        model=name,
        mode=mode,
        batch=BATCH,
        ms=elapsed,
        host_ms=host,
        device_ms=sum(map(sum, times.values())) / PROFILED / 1000,
        launches=sum(map(len, times.values())) / PROFILED,
        peak_mib=peak,
        kernels=rows,
    )
    memory = '-' if peak is None else f'{peak:.0f}'
    lines = [
        f'\n# {name}, {mode}, batch {BATCH}: {elapsed:.2f} ms, host {host:.2f} ms, '
        f'device {found["device_ms"]:.2f} ms in {found["launches"]:.0f} launches, '
        f'peak {memory} MiB',
        f'{"us":>10s}{"launches":>10s}  kernel',
    ]
    for row in rows[:60]:
        lines.append(f'{row["us"]:10.0f}{row["launches"]:10.0f}  {row["name"]:.150}')
    return found, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--warm',
        type=int,
        choices=range(len(STAGES)),
        metavar='STAGE',
        help='only compile the kernels of a stage, 0 to 3, for the cache',
    )
    parser.add_argument('--seconds', type=float, default=60, help='default: 60')
    parser.add_argument('--out', type=Path, default=Path('.'), help='default: here')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    if args.warm is not None:
        warm(args.warm)
        return
    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    settings = METER.describe()
    bandwidth = METER.copy_rate()
    lines = [
        f'# {format_settings(settings)}',
        f'# copies {bandwidth / 1e12:.2f} TB/s',
    ]
    print('\n'.join(lines), flush=True)
    profiles: List[dict] = []
    failed = False

    def save(kernels: List[dict]) -> None:
        results = {**settings, 'bandwidth': bandwidth}
        results.update(profiles=profiles, kernels=kernels)
        (args.out / 'kernels.json').write_text(json.dumps(results) + '\n')
        (args.out / 'kernels.txt').write_text('\n'.join(lines) + '\n')

    for name, mode in product(MODELS, MODES):
        if time.monotonic() > deadline:
            break
        try:
            found, text = profile_model(name, mode)
            profiles.append(found)
        except Exception as error:
            traceback.print_exc()
            failed = True
            text = [f'# FAIL {name} {mode}: {type(error).__name__}: {error}'[:300]]
        print('\n'.join(text[:32]), flush=True)
        lines += text
        save([])
        if GPU:
            torch.cuda.empty_cache()
    rows, text = measure_kernels(bandwidth, deadline)
    lines += text
    save(rows)
    sys.exit(failed or any('error' in row for row in rows))


if __name__ == '__main__':
    main()
