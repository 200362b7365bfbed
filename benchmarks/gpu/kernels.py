# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Time of each Triton kernel at MLLA-T's stages, and profiles of whole models.

Kernels are timed in CUDA graphs, without the time of the host. A pass is the time of
reading or writing the map of the stage, of C channels, at the speed of a copy. Without
a GPU the kernels are interpreted, on tiny maps: the times then mean nothing.
"""

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

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
from benchmarks.cases import DTYPES, MODES, Case  # noqa: E402
from benchmarks.meter import Call, Meter, format_settings  # noqa: E402
from benchmarks.races import make_call, prepare_model  # noqa: E402
from mlla_mm.models.layers import MLLABlock  # noqa: E402
from mlla_mm.ops.triton import _depthwise_conv as depthwise  # noqa: E402
from mlla_mm.ops.triton import _layer_norm as norm  # noqa: E402
from mlla_mm.ops.triton import _linear as linear  # noqa: E402
from mlla_mm.ops.triton import _mlla_attention as attention  # noqa: E402
from mlla_mm.ops.triton import _sums as sums  # noqa: E402

METER = Meter()
DEVICE = METER.device
DTYPE = torch.bfloat16
EPS = 1e-5
HEAD_DIMS = 32
# Channels and side of the square maps of MLLA-T for images of 224x224.
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7)) if GPU else ((32, 4), (64, 2)) * 2
BATCH = 128 if GPU else 2
IMAGE_SIZE = 224 if GPU else 64
# Calls of a model: before, for its time, and under the profiler.
WARM_UPS, REPEATS, PROFILED = (3, 5, 2) if GPU else (1, 1, 1)
MODELS = ('mlla-t', 'plain-t')


class Kernel(NamedTuple):
    """A call of ours, and PyTorch's for the same, if it is worth comparing."""

    call: Call
    reference: Optional[Call] = None


# --- The kernels ---


class Stage:
    """Makes the calls of a stage; each method is a row of the table."""

    def __init__(self, channels: int, side: int, batch: int) -> None:
        self.channels = channels
        self.heads = channels // HEAD_DIMS
        self.shape = (batch, side, side)
        self.num_bytes = batch * side**2 * channels * DTYPE.itemsize

    def _map(self, width: int = 1) -> Tensor:
        shape = (*self.shape, self.channels * width)
        return torch.randn(shape, device=DEVICE).to(DTYPE)

    def _rows(self, width: int = 1) -> Tensor:
        return self._map(width).view(-1, self.channels * width)

    def _matrix(self, rows: int, columns: int) -> Tensor:
        shape = (rows * self.channels, columns * self.channels)
        return torch.randn(shape, device=DEVICE).to(DTYPE) / 8

    def _vector(self, width: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.channels * width, device=DEVICE).to(dtype)

    def _taps(self) -> Tuple[Tensor, Tensor]:
        taps = torch.randn(self.channels, 1, 3, 3, device=DEVICE) / 3
        return taps, self._vector()

    def conv_residual(self) -> Kernel:
        x, taps = self._map(), self._taps()
        return Kernel(lambda: depthwise.conv(x, *taps, residual=True))

    def conv_silu(self) -> Kernel:
        """Of a half of a wider map, as in the block."""
        x, taps = self._map(2)[..., : self.channels], self._taps()
        return Kernel(lambda: depthwise.conv(x, *taps, act=True))

    def silu_conv_grad(self) -> Kernel:
        x, taps, grad = self._map(), self._taps(), self._map()
        return Kernel(lambda: depthwise.silu_conv_grad(x, *taps, grad))

    def conv_grad(self) -> Kernel:
        x, taps, grad = self._map(), self._taps(), self._map()
        return Kernel(lambda: depthwise.conv_grad(x, *taps, grad, residual=True))

    def gated_conv(self) -> Kernel:
        x, taps, added, gate = self._map(), self._taps(), self._map(), self._map()
        return Kernel(lambda: depthwise.gated_conv(x, *taps, added, gate))

    def gated_conv_grad(self) -> Kernel:
        x, taps = self._map(), self._taps()
        others = [self._map() for _ in range(4)]  # added, gate, grad, grad_gate
        return Kernel(lambda: depthwise.gated_conv_grad(x, *taps, *others))

    def layer_norm(self) -> Kernel:
        x, weight, bias = self._map(), self._vector(), self._vector()
        halves = weight.to(DTYPE), bias.to(DTYPE)
        return Kernel(
            lambda: norm.layer_norm(x, weight, bias, EPS, DTYPE),
            lambda: F.layer_norm(x, (self.channels,), *halves, EPS),
        )

    def layer_norm_grad(self) -> Kernel:
        x, weight, bias = self._map(), self._vector(), self._vector()
        grad, residual = self._map(), self._map()
        return Kernel(
            lambda: norm.layer_norm_grad(x, weight, bias, EPS, grad, residual)
        )

    def linear_attention(self) -> Kernel:
        qk, v = self._map(2), self._map()
        return Kernel(lambda: attention.linear_attention(qk, v, self.heads))

    def linear_attention_grad(self) -> Kernel:
        qk, v, grad = self._map(2), self._map(), self._map()
        y, states = attention.linear_attention(qk, v, self.heads)
        return Kernel(
            lambda: attention.linear_attention_grad(qk, v, y, states, grad, self.heads)
        )

    def linear_gelu(self) -> Kernel:
        """fc1 in inference."""
        return self._fc1(keep=False)

    def linear_gelu_keep(self) -> Kernel:
        """fc1 in training."""
        return self._fc1(keep=True)

    def _fc1(self, keep: bool) -> Kernel:
        x, weight, bias = self._rows(), self._matrix(4, 1), self._vector(4, DTYPE)
        return Kernel(
            lambda: linear.linear_gelu(x, weight, bias, keep),
            lambda: F.gelu(F.linear(x, weight, bias)),
        )

    def linear_residual(self) -> Kernel:
        """fc2."""
        return self._to_residual(width=4)

    def linear_residual_out(self) -> Kernel:
        """The projection of attention's output."""
        return self._to_residual(width=1)

    def _to_residual(self, width: int) -> Kernel:
        x, weight = self._rows(width), self._matrix(1, width)
        bias, residual = self._vector(dtype=DTYPE), self._map()
        rows = residual.view(-1, self.channels)
        return Kernel(
            lambda: linear.linear_residual(x, weight, bias, residual),
            lambda: rows + F.linear(x, weight, bias),
        )

    def gelu_linear_grad(self) -> Kernel:
        """Back through fc2 and GELU."""
        grad, weight = self._rows(), self._matrix(1, 4)
        hidden, bias = self._rows(4), self._vector(4)

        def reference() -> object:
            grad_hidden = torch.ops.aten.gelu_backward(grad @ weight, hidden)
            return grad_hidden, F.gelu(hidden), grad_hidden.sum(0)

        return Kernel(
            lambda: linear.gelu_linear_grad(grad, weight, hidden, bias), reference
        )

    def weight_grad(self) -> Kernel:
        """Of fc1, a product of PyTorch's."""
        grad, x = self._rows(4), self._rows()
        like = self._matrix(4, 1).float()
        return Kernel(lambda: linear.weight_grad(grad, x, like), lambda: grad.t() @ x)

    def column_sums(self) -> Kernel:
        x = self._rows(2)
        return Kernel(lambda: sums.column_sums(x), lambda: x.sum(0))

    def product(self) -> Kernel:
        """C to 2 C channels, PyTorch's, for comparison."""
        x, weight, bias = self._rows(), self._matrix(2, 1), self._vector(2, DTYPE)
        return Kernel(lambda: F.linear(x, weight, bias))

    def add(self) -> Kernel:
        """Three passes, PyTorch's, for comparison."""
        a, b = self._map(), self._map()
        return Kernel(lambda: a + b)


KERNELS = [name for name in vars(Stage) if not name.startswith('_')]


def warm(number: int, dtype: str) -> None:
    """Compile the kernels of a stage. Their code does not depend on the batch size.

    Args:
        number (int): The stage, 0 to 3.
        dtype (str): One of :data:`benchmarks.cases.DTYPES`.
    """
    channels, side = STAGES[number]
    stage = Stage(channels, side, 2)
    if dtype == 'bfloat16':
        with torch.no_grad():
            for name in KERNELS:
                getattr(stage, name)().call()
    block = MLLABlock(channels, stage.heads).to(DEVICE)
    x = torch.randn(2, side, side, channels, device=DEVICE)
    x = x.to(getattr(torch, dtype)).requires_grad_()
    for mode in MODES:
        make_call(block, x, Case('block', (side, side), 2, mode, dtype))()
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
        for name in KERNELS:
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
                    kernel = getattr(stage, name)()
                    row['us'] = METER.graph_microseconds(kernel.call)
                    if kernel.reference is not None:
                        row['pytorch_us'] = METER.graph_microseconds(kernel.reference)
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
    elapsed, host = METER.milliseconds(call, REPEATS)
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
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default='bfloat16',
        help='of --warm (default: bfloat16)',
    )
    parser.add_argument('--seconds', type=float, default=60, help='default: 60')
    parser.add_argument('--out', type=Path, default=Path('.'), help='default: here')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    if args.warm is not None:
        warm(args.warm, args.dtype)
        return
    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    settings = METER.describe(REPEATS)
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
