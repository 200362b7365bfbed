# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Time of each Triton kernel at MLLA-T's stages, and profiles of whole models.

Kernels are timed in CUDA graphs, so that the host does not count. A pass is what
reading or writing the map of the stage, of C channels, takes at the speed of a copy.
Without a GPU the kernels are interpreted, on tiny maps: times then mean nothing.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch

GPU = torch.cuda.is_available()
if not GPU:  # before the kernels are imported
    os.environ['TRITON_INTERPRET'] = '1'
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import mlla_mm  # noqa: E402, F401
from benchmarks import races  # noqa: E402
from mlla_mm.models.layers import MLLABlock  # noqa: E402
from mlla_mm.ops.triton import _depthwise_conv as depthwise  # noqa: E402
from mlla_mm.ops.triton import _layer_norm as norm  # noqa: E402
from mlla_mm.ops.triton import _linear as linear  # noqa: E402
from mlla_mm.ops.triton import _mlla_attention as attention  # noqa: E402
from mlla_mm.ops.triton import _sums as sums  # noqa: E402

DEVICE = 'cuda' if GPU else 'cpu'
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

Call = Callable[[], object]


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


def warm(stage: int, dtype: torch.dtype) -> None:
    """Compile the kernels of a stage; their code does not depend on the batch size."""
    channels, side = STAGES[stage]
    maker = Stage(channels, side, 2)
    if dtype == DTYPE:
        with torch.no_grad():
            for name in KERNELS:
                getattr(maker, name)().call()
    block = MLLABlock(channels, maker.heads).to(DEVICE)
    x = torch.randn(2, side, side, channels, device=DEVICE).to(dtype)
    enabled = dtype != torch.float32
    options = dict(dtype=dtype if enabled else None, enabled=enabled)
    with torch.no_grad(), torch.autocast(DEVICE, **options):
        block(x)
    with torch.autocast(DEVICE, **options):
        y = block(x.requires_grad_())
    y.backward(torch.ones_like(y))
    synchronize()


def measure_kernels(bandwidth: float, deadline: float) -> Tuple[List[dict], List[str]]:
    rows, lines = [], []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    for number, (channels, side) in enumerate(STAGES):
        maker = Stage(channels, side, BATCH)
        tell(f'\nStage {number}: {BATCH} x {side} x {side} x {channels}, {DTYPE}')
        tell(f'{"kernel":24s}{"us":>10s}{"passes":>10s}{"PyTorch us":>12s}')
        for name in KERNELS:
            if time.monotonic() > deadline:
                tell('Out of time')
                return rows, lines
            row = dict(kernel=name, stage=number, channels=channels, side=side)
            try:
                with torch.no_grad():
                    kernel = getattr(maker, name)()
                    row['us'] = microseconds(kernel.call)
                    if kernel.reference is not None:
                        row['pytorch_us'] = microseconds(kernel.reference)
            except Exception as error:
                traceback.print_exc()
                row['error'] = f'{type(error).__name__}: {error}'[:300]
                rows.append(row)
                tell(f'{name:24s} FAIL {row["error"]}'.replace('\n', ' '))
                continue
            row['passes'] = row['us'] * 1e-6 * bandwidth / maker.num_bytes
            rows.append(row)
            other = f'{row["pytorch_us"]:12.1f}' if 'pytorch_us' in row else ''
            tell(f'{name:24s}{row["us"]:10.1f}{row["passes"]:10.1f}{other}')
    return rows, lines


# --- Clocks ---


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def microseconds(call: Call, calls: int = 10, repeats: int = 5) -> float:
    """Median time of a call in a CUDA graph of several."""
    if not GPU:
        return milliseconds(call, 1)[0] * 1000
    graph = capture(call, calls)
    graph.replay()
    return milliseconds(graph.replay, repeats)[0] * 1000 / calls


def capture(call: Call, calls: int) -> 'torch.cuda.CUDAGraph':
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def milliseconds(call: Call, repeats: int) -> Tuple[float, float]:
    """Medians of a call on the device, and on the host until it returns."""
    times = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        if not GPU:
            call()
            seconds = time.perf_counter() - begin
            times.append((seconds * 1000, seconds * 1000))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        host = time.perf_counter() - begin
        last.synchronize()
        times.append((first.elapsed_time(last), host * 1000))
    device, host = zip(*times)
    return statistics.median(device), statistics.median(host)


def copy_bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    a = torch.zeros(2**30 if GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    for _ in range(3):
        b.copy_(a)
    return 2 * a.numel() / (milliseconds(lambda: b.copy_(a), 10)[0] / 1000)


# --- Whole models ---


def make_call(name: str, mode: str) -> Call:
    torch.manual_seed(0)
    model = races.build_model(name, classify=True).to(DEVICE)
    model.train(mode == 'train')
    x = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE)

    def forward() -> Tensor:
        with torch.autocast(DEVICE, dtype=DTYPE):
            return model(x)

    if mode == 'infer':
        return torch.no_grad()(forward)
    output = forward()
    grad = F.normalize(torch.randn_like(output).flatten(), dim=0).view_as(output)

    def step() -> None:
        forward().backward(grad)
        model.zero_grad(set_to_none=True)

    return step


def profile_model(name: str, mode: str) -> Tuple[dict, List[str]]:
    """Time, launches and memory of a call, and its kernels by name."""
    call = make_call(name, mode)
    for _ in range(WARM_UPS):
        call()
    synchronize()
    peak = None
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**20
    elapsed, host = milliseconds(call, REPEATS)
    kernels = {}
    for event in _record(call):
        count, total = kernels.get(event.name, (0, 0.0))
        own = event.self_device_time_total if GPU else event.self_cpu_time_total
        kernels[event.name] = (count + 1, total + own)
    rows = [
        dict(name=key, launches=count / PROFILED, us=total / PROFILED)
        for key, (count, total) in kernels.items()
    ]
    rows.sort(key=lambda row: -row['us'])
    found = dict(
        model=name,
        mode=mode,
        batch=BATCH,
        ms=elapsed,
        host_ms=host,
        device_ms=sum(row['us'] for row in rows) / 1000,
        launches=sum(row['launches'] for row in rows),
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
        lines.append(f'{row["us"]:10.0f}{row["launches"]:10.0f}  {row["name"][:150]}')
    return found, lines


def _record(call: Call) -> list:
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        for _ in range(PROFILED):
            call()
        synchronize()
    kind = getattr(torch.autograd.DeviceType, DEVICE.upper())
    return [event for event in recorded.events() if event.device_type == kind]


# --- ---


def save(out: Path, results: Dict[str, object], lines: List[str]) -> None:
    (out / 'kernels.json').write_text(json.dumps(results) + '\n')
    (out / 'kernels.txt').write_text('\n'.join(lines) + '\n')


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
        choices=races.DTYPES,
        default='bfloat16',
        help='of --warm (default: bfloat16)',
    )
    parser.add_argument('--seconds', type=float, default=60, help='default: 60')
    parser.add_argument('--out', type=Path, default=Path('.'), help='default: here')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    if args.warm is not None:
        warm(args.warm, getattr(torch, args.dtype))
        return
    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    settings = races.describe_run(DEVICE, REPEATS)
    bandwidth = copy_bandwidth()
    lines = [
        f'# {races.format_settings(settings)}',
        f'# copies {bandwidth / 1e12:.2f} TB/s',
    ]
    print('\n'.join(lines), flush=True)
    results = dict(settings, bandwidth=bandwidth, profiles=[], kernels=[])
    failed = False
    for name in MODELS:
        for mode in races.MODES:
            if time.monotonic() > deadline:
                break
            try:
                found, text = profile_model(name, mode)
            except Exception as error:
                traceback.print_exc()
                failed = True
                text = [f'# FAIL {name} {mode}: {type(error).__name__}: {error}'[:300]]
            else:
                results['profiles'].append(found)
            print('\n'.join(text[:32]), flush=True)
            lines += text
            save(args.out, results, lines)
            if GPU:
                torch.cuda.empty_cache()
    results['kernels'], text = measure_kernels(bandwidth, deadline)
    failed = failed or any('error' in row for row in results['kernels'])
    save(args.out, results, lines + text)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
