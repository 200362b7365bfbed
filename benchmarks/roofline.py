# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The least time that a GPU needs for a model, counted kernel by kernel without a GPU.

The time of a kernel is the longest of three: its bytes at the rate of the memory, its
matrix products at the rate of the tensor cores, and its launch. An operator of PyTorch
moves all tensors that it takes and gives, each once and whole. A kernel of Triton moves
what it states, see ``mlla_mm/ops/triton/_moves.py``. Most real kernels are slower, and
small maps come from a cache. The count is a bound to compare measured times and
assemblies with.
"""

import argparse
import contextlib
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import mlla_mm  # noqa: E402, F401  (before anything imports mmcv.ops)
from benchmarks import cases, models  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.pretended_cuda import backward, pretended_cuda  # noqa: E402
from mlla_mm.evaluation.markdown import markdown_table  # noqa: E402
from mlla_mm.models import fusing  # noqa: E402
from mlla_mm.ops import naive  # noqa: E402
from mlla_mm.ops.triton._moves import moves_of  # noqa: E402

MODELS = tuple(f'mlla-{size}' for size in models.SIZES)
OPS = ('plain', 'naive', 'eager', 'default', 'fused')
FORWARD, BACKWARD = 'forward', 'backward'

# Operators that write a tensor without reading it.
_OVERWRITING = ('copy_', '_foreach_copy_', 'fill_', 'zero_', '_foreach_zero_')
_FILLING = re.compile('(new_)?(zeros|ones|full)(_like)?')
_EMPTY = re.compile('(new_)?empty(_like|_strided|_permuted)*')


class Kernel(NamedTuple):
    """The work of a kernel.

    Attributes:
        stage (str): 'forward' or 'backward'.
        name (str): Operator of PyTorch, or name of a Triton kernel.
        bytes (int): Bytes that it reads and writes.
        flops (int): Operations of matrix products and convolutions. A multiplication
            and its addition count two.
        dtype (torch.dtype): Dtype of the factors.
    """

    stage: str
    name: str
    bytes: int
    flops: int
    dtype: torch.dtype


class GPU(NamedTuple):
    """Speed of a GPU. The defaults are those of an H100.

    Attributes:
        bandwidth (float): Bytes per second that a kernel reads and writes.
            Defaults to 2.7e12.
        half (float): Operations per second of products in half precision.
            Defaults to 6e14.
        single (float): The same in float32. Defaults to 4.5e13.
        launch (float): Seconds that any kernel takes at least. Defaults to 2.2e-6.
    """

    bandwidth: float = 2.7e12
    half: float = 6e14
    single: float = 4.5e13
    launch: float = 2.2e-6

    def seconds(self, kernel: Kernel) -> float:
        """Time of a kernel."""
        rate = self.half if kernel.dtype in naive.HALF else self.single
        return max(kernel.bytes / self.bandwidth, kernel.flops / rate, self.launch)


class Total(NamedTuple):
    """Sum over kernels: how many, their bytes and operations, and their time."""

    launches: int
    bytes: int
    flops: int
    seconds: float


def add_up(kernels: Sequence[Kernel], gpu: GPU) -> Total:
    """Sum over kernels on a GPU."""
    return Total(
        len(kernels),
        sum(kernel.bytes for kernel in kernels),
        sum(kernel.flops for kernel in kernels),
        sum(gpu.seconds(kernel) for kernel in kernels),
    )


def add_up_by_name(kernels: Sequence[Kernel], gpu: GPU) -> Dict[Tuple[str, str], Total]:
    """Sums of each stage and name, the longest time first."""
    groups = defaultdict(list)
    for kernel in kernels:
        groups[kernel.stage, kernel.name].append(kernel)
    totals = {key: add_up(group, gpu) for key, group in groups.items()}
    return dict(sorted(totals.items(), key=lambda item: -item[1].seconds))


class Counter(TorchDispatchMode):
    """Lists the kernels that operators on CUDA tensors start within the context.

    An operator counts as one kernel, also one that takes many tensors at once, and each
    gradient of a convolution as one. Views and new memory are no kernels. Triton's
    kernels state their bytes and products.

    Attributes:
        kernels (list[Kernel]): What was counted.
        stage (str): The stage of the next kernels. Defaults to 'forward'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: List[Kernel] = []
        self.stage = FORWARD
        self._is_entered = False

    def __enter__(self) -> 'Counter':
        self._is_entered = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._is_entered = False
        super().__exit__(*error)

    def add(self, name: str, size: int, flops: int, dtype: torch.dtype) -> None:
        """List a kernel of the current stage, if the context is entered."""
        if self._is_entered:
            self.kernels.append(Kernel(self.stage, name, size, flops, dtype))

    def add_launch(self, name: str, arguments: Dict[str, Any]) -> None:
        """List the launch of a Triton kernel."""
        moves = moves_of(name, arguments)
        size = sum(moves.reads.values()) + sum(moves.writes.values())
        self.add(name, size, moves.flops, _tensors(arguments)[0].dtype)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == 'convolution_backward':
            self._add_convolution_backward(out, *args)
        elif not _EMPTY.fullmatch(name):
            self._add_operator(func, name, args, kwargs, out)
        return out

    def _add_operator(
        self, func: Any, name: str, args: Sequence, kwargs: dict, out: Any
    ) -> None:
        taken, given = _tensors((args, kwargs)), _tensors(out)
        # Arguments that the operator writes to.
        declared = func._schema.arguments
        named = dict(zip((argument.name for argument in declared), args), **kwargs)
        changed = _tensors(
            [
                named.get(argument.name)
                for argument in declared
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
        )
        memory = {_memory(x) for x in taken}
        is_view = not changed and all(_memory(x) in memory for x in given)
        if is_view or not any(x.is_cuda for x in taken + given):
            return
        if _FILLING.fullmatch(name):
            taken = []
        elif name in _OVERWRITING or 'out' in kwargs:
            written = set(map(id, changed))
            taken = [x for x in taken if id(x) not in written]
        flops = 0
        # The registry has no in-place operators, such as addmm_.
        count_flops = flop_registry.get(getattr(torch.ops.aten, name.rstrip('_'), None))
        if count_flops is not None:
            flops = count_flops(*args, **kwargs, out_val=out)
        if name == 'convolution':
            name = _name_convolution(name, *args[:2])
        dtype = args[1].dtype if flops else (given or taken or changed)[0].dtype
        self.add(name, count_bytes(taken) + count_bytes(given or changed), flops, dtype)

    def _add_convolution_backward(
        self,
        out: Sequence[Optional[Tensor]],
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        *options: Any,
    ) -> None:
        name = _name_convolution('convolution_backward', x, weight)
        flops = 2 * grad.numel() * weight[0].numel()
        # The gradients of the input, the weight and the bias.
        sources = (([grad, weight], flops), ([grad, x], flops), ([grad], 0))
        for given, (taken, products) in zip(out, sources):
            if given is not None:
                self.add(name, count_bytes([*taken, given]), products, weight.dtype)


def _tensors(tree: object) -> List[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def count_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors. Shared memory counts once, and expanded tensors unexpanded."""
    sizes = {}
    for x in tensors:
        numbers = math.prod(
            size for size, stride in zip(x.shape, x.stride()) if stride or not size
        )
        key = _memory(x), x.storage_offset(), numbers
        sizes[key] = numbers * x.element_size()
    return sum(sizes.values())


def _name_convolution(name: str, x: Tensor, weight: Tensor) -> str:
    """Such as 'convolution 3x3 depthwise'."""
    kernel = 'x'.join(map(str, weight.shape[2:]))
    depthwise = ' depthwise' if 1 == weight.shape[1] < x.shape[1] else ''
    return f'{name} {kernel}{depthwise}'


@contextlib.contextmanager
def counted(ops: str = 'fused') -> Iterator[Counter]:
    """A pretended device, and a counter for it. The counter counts where it is entered.

    Args:
        ops (str): Which implementation of the ops runs, 'naive', 'eager' or 'fused'.
            'default' is what runs where MLLA_OPS is not set. Defaults to 'fused'.
    """
    counter = Counter()
    with mock.patch.dict('os.environ', MLLA_OPS='' if ops == 'default' else ops):
        with pretended_cuda(counter.add_launch):
            yield counter


def count_model(
    name: str, case: Case, ops: str = 'fused', fuse_conv_bn: bool = False
) -> List[Kernel]:
    """Kernels of a call of a model.

    Args:
        name (str): One of :data:`MODELS`.
        case (Case): What the model does.
        ops (str): Which implementation of the ops runs, see :func:`counted`. 'plain' is
            the plain assembly of the model. Defaults to 'fused'.
        fuse_conv_bn (bool): Whether BatchNorm is folded into the convolutions first.
            Only for inference. Defaults to False.

    Raises:
        ValueError: If the fused kernels are asked for and there is no Triton.
    """
    training = case.mode == 'train'
    dtype = getattr(torch, case.dtype)
    half = dtype in naive.HALF

    def autocast() -> torch.autocast:
        return torch.autocast('cuda', dtype=dtype if half else None, enabled=half)

    if ops == 'plain':
        name, ops = name.replace('mlla', 'plain'), 'default'
    with counted(ops) as counter:
        # On this device no random numbers are drawn, which would take long. The rates
        # of stochastic depth are 0.
        with torch.device('cuda'):
            model = models.build_model(name, case.task == 'classification')
        model.train(training)
        if fuse_conv_bn:
            fusing.fuse_conv_bn(model)
        images = torch.randn(case.batch_size, 3, *case.shape, device='cuda')
        with torch.set_grad_enabled(training):
            with autocast():
                model(images)  # not counted: the first call fills caches
            with counter, autocast():
                outputs = model(images)
        if training:
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            grads = [torch.ones_like(output) for output in outputs]
            counter.stage = BACKWARD
            with counter:
                backward(outputs, grads)
    return counter.kernels


def format_total(total: Total) -> str:
    """A line of sums."""
    return (
        f'{total.launches} launches, {total.bytes / 1e9:.1f} GB, '
        f'{total.flops / 1e12:.2f} TFLOP, {total.seconds * 1e3:.2f} ms'
    )


def format_operators(totals: Dict[Tuple[str, str], Total]) -> str:
    """The sums of :func:`add_up_by_name` as a table in Markdown."""
    rows = [
        [
            stage,
            name,
            str(part.launches),
            f'{part.bytes / 1e9:.2f}',
            f'{part.flops / 1e12:.3f}',
            f'{part.seconds * 1e3:.2f}',
        ]
        for (stage, name), part in totals.items()
    ]
    columns = ['Pass', 'Operator', 'launches', 'GB', 'TFLOP', 'ms']
    return markdown_table(columns, rows)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('models', nargs='+', choices=MODELS)
    parser.add_argument(
        '--ops',
        nargs='+',
        choices=OPS,
        default=['fused'],
        help='values of MLLA_OPS; default: it is not set; plain: the plain assembly '
        '(default: fused)',
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        default=['classification'],
        help=f'{", ".join(cases.PRESETS)}, or HEIGHTxWIDTH (default: classification)',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        nargs='+',
        default=[128],
        help='images: one number for all shapes, or one for each (default: 128)',
    )
    parser.add_argument(
        '--mode',
        nargs='+',
        choices=cases.MODES,
        default=['infer'],
        help='train: forward and backward (default: infer)',
    )
    parser.add_argument(
        '--dtype',
        choices=cases.DTYPES,
        default='bfloat16',
        help='half precision: by autocast (default: bfloat16)',
    )
    parser.add_argument(
        '--fuse-conv-bn',
        action='store_true',
        help='fold BatchNorm into the convolutions first, in inference',
    )
    parser.add_argument(
        '--bandwidth', type=float, default=2.7, help='TB/s (default: 2.7, of an H100)'
    )
    parser.add_argument(
        '--tflops',
        type=float,
        help='of products in the dtype, per second (default: 600, in float32 45)',
    )
    parser.add_argument(
        '--launch',
        type=float,
        default=2.2,
        help='microseconds that a kernel takes at least (default: 2.2)',
    )
    parser.add_argument(
        '--operators', action='store_true', help='print the sums of each operator, too'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='save the sums here')
    args = parser.parse_args(argv)
    try:
        args.cases = cases.make_cases(
            args.shape, args.batch_size, args.mode, [args.dtype]
        )
    except ValueError as error:
        parser.error(str(error))
    if args.fuse_conv_bn and 'infer' not in args.mode:
        parser.error('--fuse-conv-bn is for inference: add infer to --mode.')
    if min(args.bandwidth, args.tflops or 1) <= 0 or args.launch < 0:
        parser.error(
            '--bandwidth and --tflops take positive numbers, --launch no less than 0.'
        )
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Count the kernels of models, and print a table of their times.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, those of the
            command line.
    """
    args = parse_args(argv)
    gpu = GPU(bandwidth=args.bandwidth * 1e12, launch=args.launch * 1e-6)
    if args.tflops is not None:
        rate = 'single' if args.dtype == 'float32' else 'half'
        gpu = gpu._replace(**{rate: args.tflops * 1e12})
    rows: List[List[str]] = []
    counts: List[dict] = []
    for name, case in product(args.models, args.cases):
        fuses = args.fuse_conv_bn and case.mode == 'infer'
        title = f'{case}, after fuse_conv_bn' if fuses else str(case)
        cells = []
        for ops in args.ops:
            kernels = count_model(name, case, ops, fuses)
            total, operators = add_up(kernels, gpu), add_up_by_name(kernels, gpu)
            print(f'{name}, {ops}: {title}: {format_total(total)}', flush=True)
            if args.operators:
                print(f'\n{format_operators(operators)}\n')
            cells.append(f'{total.seconds * 1e3:.2f} ({total.launches})')
            counts.append(
                dict(
                    model=name,
                    ops=ops,
                    fuse_conv_bn=fuses,
                    **case._asdict(),
                    total=total._asdict(),
                    operators=[
                        dict(stage=stage, name=operator, **part._asdict())
                        for (stage, operator), part in operators.items()
                    ],
                )
            )
        rows.append([name, title, *cells])
    table = markdown_table(['Model', 'Case', *args.ops], rows)
    print(f'\nMilliseconds (launches):\n\n{table}')
    if args.json:
        found = dict(gpu=gpu._asdict(), counts=counts)
        args.json.write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
    main()
