# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Checks of whole networks on a GPU, besides the tests.

Usage: python benchmarks/gpu/checks.py [env golden grads shapes models inout graphs]

Each check prints PASS or FAIL, and a number. The exit status is 1 if a check failed.
Without a GPU the checks run on the CPU where they can.
"""

import copy
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for tests/, which has the recorded outputs

import mlla_mm  # noqa: E402
from benchmarks.meter import Meter, format_settings  # noqa: E402
from benchmarks.peak_memory import largest_size, synthetic_batch  # noqa: E402
from mlla_mm.compat.pytorch import (  # noqa: E402
    convolutions_use_tf32,
    products_use_tf32,
    without_tf32,
)
from mlla_mm.engine.cuda_graph import CudaGraph  # noqa: E402
from mlla_mm.models import MLLA  # noqa: E402
from mlla_mm.ops import triton as fused  # noqa: E402

METER = Meter()
GPU, DEVICE = METER.is_cuda, METER.device
HALF = ('float16', 'bfloat16') if GPU else ('bfloat16',)
TF32 = 'TF32 convolutions'
PRECISIONS = ('float32', TF32, *HALF) if GPU else ('float32', *HALF)
NANO = dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
# One block a stage, of channels that are no power of two.
WIDE = dict(embed_dims=96, depths=(1, 1, 1, 1), num_heads=(3, 6, 12, 24))
DEMOS = (
    'classification/mlla-nano_digits.py',
    'segmentation/upernet_mlla-nano_digits.py',
    'detection/mask-rcnn_mlla-nano_fpn_digits.py',
)
failed: List[str] = []


# --- What the checks share ---


def variants() -> List[str]:
    """What :func:`ops` takes on this machine."""
    kernels = ['default', 'fused'] if fused.is_available(DEVICE) else []
    return ['naive', 'eager', *kernels]


def ops(name: str) -> AbstractContextManager:
    """A value of MLLA_OPS, or 'default', where it is not set."""
    return mock.patch.dict(os.environ, MLLA_OPS='' if name == 'default' else name)


def precision(name: str) -> AbstractContextManager:
    """The context of one of :data:`PRECISIONS`."""
    if name in HALF:
        return torch.autocast(DEVICE.type, dtype=getattr(torch, name))
    # PyTorch's default: TF32 for convolutions, and not for matrix products.
    return nullcontext() if name == TF32 else without_tf32()


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, in float64."""
    actual, expected = (t.detach().double().cpu() for t in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def worst(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    return max(map(error, actual, expected))


def report(name: str, value: float, limit: float, note: str = '') -> None:
    """Print a line of a check, which passes if the value is at most the limit.

    Args:
        name (str): What is checked.
        value (float): What was found; NaN fails.
        limit (float): The largest value that passes.
        note (str): Text to append. Defaults to ''.
    """
    good = value <= limit
    line = f'{"PASS" if good else "FAIL"} {name}: {value:.3g} (limit {limit:g}) {note}'
    print(line.rstrip(), flush=True)  # time may run out before the end
    if not good:
        failed.append(name)


@contextmanager
def check(name: str) -> Iterator[None]:
    """Count an error as a failure of this check, and go on with the others."""
    try:
        yield
    except Exception as raised:
        failed.append(name)
        traceback.print_exc()
        message = f'{type(raised).__name__}: {raised}'.replace('\n', ' ')
        print(f'FAIL {name}: {message[:300]}', flush=True)


# --- The checks ---


def env() -> None:
    """Versions, and that all packages can be imported."""
    import cv2
    import mmdet.apis  # noqa: F401
    import mmpretrain.apis  # noqa: F401
    import mmseg.apis  # noqa: F401
    import numpy

    print(
        f'  {format_settings(METER.describe())}, mlla_mm {mlla_mm.__version__}, '
        f'NumPy {numpy.__version__}, OpenCV {cv2.__version__}'
    )
    print(f'  {os.cpu_count()} cores, ops {", ".join(variants())}')
    if GPU:
        found = torch.cuda.get_device_properties(0)
        memory = found.total_memory / 2**30
        x, w = (
            torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
            for _ in range(2)
        )
        seconds = METER.milliseconds(lambda: x @ w)[0] / 1000
        print(
            f'  {found.multi_processor_count} SMs, {memory:.0f} GiB, copies '
            f'{METER.copy_rate() / 1e12:.2f} TB/s, bfloat16 products '
            f'{2 * 8192**3 / seconds / 1e12:.0f} TFLOP/s'
        )


def golden() -> None:
    """The authors' recorded features, in every implementation and precision."""
    from tests import reference

    limits = {'float32': 1e-4, TF32: 3e-3, 'float16': 2e-2, 'bfloat16': 6e-2}
    sizes = dict(t='96x132', s='64x96', b='64x96')
    for arch in sizes if GPU else 't':
        size = sizes[arch]
        expected = [reference.recorded(f'feat{i}_mlla-{arch}_{size}') for i in range(4)]
        model = MLLA(arch).eval()
        weights = reference.official_weights(f'mlla-{arch}_downstream')
        found = model.load_state_dict(weights, strict=False)
        assert not found.missing_keys, found.missing_keys
        model = model.to(DEVICE)
        x = reference.image(size, 2 if arch == 't' else 1).to(DEVICE)
        for name, kind in product(variants(), PRECISIONS):
            title = f'golden {arch} {name} {kind}'
            with check(title), torch.no_grad(), ops(name), precision(kind):
                report(title, worst(model(x), expected), limits[kind])


def grads() -> None:
    """Gradients of a network in training against float64 and the definitions."""
    limits = dict(float32=1e-2, float16=1e-1, bfloat16=3e-1)
    cases: List[Tuple[str, Union[str, dict], Tuple[int, int]]] = [
        ('nano', NANO, (64, 96)),
        ('nano', NANO, (75, 101)),
    ]
    if GPU:
        cases.append(('t', 't', (96, 132)))
    for label, arch, (height, width) in cases:
        label = f'grads {label} {height}x{width}'
        torch.manual_seed(0)
        model, x = MLLA(arch).train(), torch.randn(2, 3, height, width)
        with ops('naive'):
            expected = _gradients(copy.deepcopy(model).double(), x.double())
        model, x = model.to(DEVICE), x.to(DEVICE)
        for name in variants():
            for kind in ('float32', *HALF):
                title = f'{label} {name} {kind}'
                with check(title), without_tf32(), ops(name):
                    found = _gradients(model, x, kind)
                    report(title, error(found, expected), limits[kind])
            title = f'{label} {name} with_cp'
            with check(title), without_tf32(), ops(name):
                before = _gradients(model, x)
                for stage in model.layers:
                    stage.with_cp = True
                found = _gradients(model, x)
                for stage in model.layers:
                    stage.with_cp = False
                report(title, error(found, before), 1e-3)


def _gradients(model: nn.Module, x: Tensor, kind: str = 'float32') -> Tensor:
    """Gradients of all parameters, as a vector; statistics stay as they were."""
    model.zero_grad(set_to_none=True)
    state = {key: buffer.clone() for key, buffer in model.named_buffers()}
    with precision(kind):
        outputs = model(x)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator) for y in outputs]
    # The sums are in the model's float64, or in float32.
    outputs = [y.to(torch.promote_types(y.dtype, torch.float32)) for y in outputs]
    torch.autograd.backward(outputs, [w.to(y) for w, y in zip(weights, outputs)])
    model.load_state_dict(state, strict=False)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([grad.double().cpu().flatten() for grad in grads])


def shapes() -> None:
    """Large and odd maps, and the same bits twice."""
    sizes = [(1, 65, 33), (1, 32, 32)]
    if GPU:
        sizes += [(1, 800, 1280), (1, 512, 2048), (3, 65, 33), (130, 32, 64)]
    for label, arch in (('nano', NANO), ('wide', WIDE)):
        torch.manual_seed(0)
        model = MLLA(arch).to(DEVICE).eval()
        for number, height, width in sizes:
            title = f'shapes {label} {number}x{height}x{width}'
            x = torch.randn(number, 3, height, width, device=DEVICE)
            with torch.no_grad(), without_tf32():
                with ops('naive'):
                    expected = model(x)
                for name in variants()[1:]:
                    with check(f'{title} {name}'), ops(name):
                        found, again = model(x), model(x)
                        report(f'{title} {name}', worst(found, expected), 1e-4)
                        if name in ('default', 'fused'):
                            differ = not all(map(torch.equal, found, again))
                            report(f'{title} {name}, other bits', float(differ), 0)
    with check('rotations of two devices'), torch.no_grad(), without_tf32():
        model, x = MLLA(NANO).eval(), torch.randn(2, 3, 64, 96)
        first = model(x)
        on_device = copy.deepcopy(model).to(DEVICE)(x.to(DEVICE))
        last = model(x)
        value = max(worst(on_device, first), worst(last, first))
        report('rotations of two devices', value, 1e-4)


def models() -> None:
    """Training steps of the demos' models, and the stand-ins for mmcv's ops."""
    settings = [(None, 1), ('float16', 1), ('bfloat16', 2)] if GPU else [(None, 2)]
    for path in DEMOS:
        for dtype, micro_batches in settings:
            for name in variants():
                task = path.split('/')[0]
                title = f'steps {task} {dtype or "float32"} x{micro_batches} {name}'
                with check(title), ops(name):
                    losses = _train(path, dtype, micro_batches, 8 if GPU else 2)
                    finite = all(abs(loss) < 1e9 for loss in losses)
                    note = f'loss {losses[0]:.3f} to {losses[-1]:.3f}'
                    report(f'{title}, not finite', float(not finite), 0, note)
    with check('stand-in ops'):
        _compare_stand_ins()
    for kind in ('bbox', 'mask'):
        with check(f'RoI levels of the {kind} head'):
            _compare_roi_levels(kind)


def _train(
    path: str, dtype: Optional[str], micro_batches: int, steps: int
) -> List[float]:
    """Losses on synthetic images; the classifier learns from its average (MESA)."""
    from mmengine.config import Config
    from mmengine.optim import AmpOptimWrapper, OptimWrapper
    from mmengine.registry import MODELS, DefaultScope

    from mlla_mm.engine.ema import ModelEMA
    from mlla_mm.engine.parts import replace_sync_bn
    from mlla_mm.reproducible.loops import train_step

    cfg = Config.fromfile(ROOT / 'configs' / path)
    replace_sync_bn(cfg.model)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).to(DEVICE).train()
        average = None
        if hasattr(model, 'set_teacher'):
            average = ModelEMA(model, 0.9)
            model.set_teacher(average.module)
        options: Dict[str, Any] = dict(
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
            accumulative_counts=micro_batches,
            clip_grad=dict(max_norm=1.0),
        )
        if dtype is None:
            wrapper = OptimWrapper(**options)
        else:
            scale = 'dynamic' if dtype == 'float16' else 1.0
            wrapper = AmpOptimWrapper(dtype=dtype, loss_scale=scale, **options)
        wrapper.initialize_count_status(nn.Identity(), 0, 100)
        size = largest_size(cfg)
        batches = [synthetic_batch(cfg, 4, size) for _ in range(micro_batches)]
        losses = []
        for step in range(steps):
            # Preprocessing changes a batch in place.
            found = train_step(model, copy.deepcopy(batches), wrapper, (0, step))
            losses.append(float(found['loss']))
            if average is not None:
                average.update(model)
    return losses


def _compare_stand_ins() -> None:
    from mmcv.ops import roi_align

    from mlla_mm.compat import mmcv_ext

    torch.manual_seed(0)
    boxes = torch.rand(2000, 4) * 300
    boxes[:, 2:] += boxes[:, :2] + 1
    scores = torch.rand(2000)
    kept = mmcv_ext.nms(boxes, scores, 0.5, 0)
    found = mmcv_ext.nms(boxes.to(DEVICE), scores.to(DEVICE), 0.5, 0).cpu()
    report('nms, other boxes', float(not torch.equal(found, kept)), 0)
    for dtype in HALF:  # raises no error
        halves = scores.to(DEVICE, getattr(torch, dtype))
        mmcv_ext.nms(boxes.to(DEVICE), halves, 0.5, 0)

    def align(x: Tensor) -> List[Tensor]:
        x = x.clone().requires_grad_()
        y = roi_align(x, rois.to(x.device), (7, 7), 0.25, 0, 'avg', True)
        return [y, *torch.autograd.grad(y.float().sum(), x)]

    x = torch.randn(2, 8, 40, 40)
    first, last = torch.rand(50, 2) * 60, torch.rand(50, 2) * 60 + 70
    rois = torch.cat([torch.randint(2, (50, 1)).float(), first, last], dim=1)
    expected = align(x)
    report('roi_align float32', worst(align(x.to(DEVICE)), expected), 1e-5)
    for dtype in HALF:
        pooled = align(x.to(DEVICE, getattr(torch, dtype)))
        report(f'roi_align {dtype}', worst(pooled, expected), 1e-2)


def _compare_roi_levels(kind: str) -> None:
    """Whether boxes are pooled from the same level under autocast as in float32."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(ROOT / 'configs' / DEMOS[2])
    with DefaultScope.overwrite_default_scope('mmdet'):
        extractor = MODELS.build(cfg.model.roi_head[f'{kind}_roi_extractor'])
    sides = (100, 300, 400, 447, 500)
    rois = torch.tensor([[0, 10.3, 10.3, 10.3 + side, 10.3 + side] for side in sides])
    maps = [torch.randn(1, 64, 256 // 2**i, 256 // 2**i) for i in range(4)]
    extractor, rois = extractor.to(DEVICE), rois.to(DEVICE)
    maps = [feature.to(DEVICE) for feature in maps]
    map_roi_levels, seen = extractor.map_roi_levels, []

    def record(rois: Tensor, num_levels: int) -> Tensor:
        seen.append(map_roi_levels(rois, num_levels))
        return seen[-1]

    with mock.patch.object(extractor, 'map_roi_levels', record):
        extractor(maps, rois)
        for dtype in HALF:
            extractor([feature.to(getattr(torch, dtype)) for feature in maps], rois)
            wrong = [s for s, bad in zip(sides, (seen[-1] != seen[0]).tolist()) if bad]
            report(
                f'RoI levels of the {kind} head, {dtype} maps',
                float(len(wrong)),
                0,
                f'sides {wrong}' if wrong else '',
            )


def inout() -> None:
    """Checkpoints between devices, and settings of TF32."""
    from mlla_mm.checkpoints.reader import load_checkpoint_file

    with check('checkpoint'), tempfile.TemporaryDirectory() as folder:
        layer = nn.Linear(3, 3).to(DEVICE)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.randn(2, 3, device=DEVICE)).sum().backward()
        optimizer.step()
        saved = dict(
            state_dict=layer.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=torch.amp.GradScaler(DEVICE.type).state_dict(),
            where=DEVICE,
        )
        path = os.path.join(folder, 'checkpoint.pth')
        torch.save(saved, path)
        for where in dict.fromkeys(('cpu', DEVICE.type)):
            weight = load_checkpoint_file(path, where)['state_dict']['weight']
            assert weight.device.type == where
            report(f'checkpoint {DEVICE} to {where}', error(weight, layer.weight), 0)
    _compare_tf32('by default')
    with without_tf32():
        _compare_tf32('switched off')
    if not hasattr(torch.backends, 'fp32_precision'):
        print('Skipped before PyTorch 2.9: fp32_precision')
        return
    model, x = MLLA(NANO).to(DEVICE).eval(), torch.randn(2, 3, 64, 96, device=DEVICE)
    with torch.no_grad(), without_tf32(), ops('naive'):
        expected = model(x)
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = 'tf32'  # readers of older flags now raise errors
    try:
        _compare_tf32("by fp32_precision = 'tf32'")
        for name in variants():
            title = f"fp32_precision = 'tf32' {name}"
            with check(title), torch.no_grad(), ops(name):
                report(title, worst(model(x), expected), 1e-2)
        with check('settings of a benchmark'):
            METER.describe()
    finally:
        torch.backends.fp32_precision = before


def _compare_tf32(setting: str) -> None:
    """What is said of TF32 with what PyTorch computes in it."""
    if not GPU or torch.cuda.get_device_capability() < (8, 0):  # older ones have none
        return
    x, w = (torch.randn(256, 256, device=DEVICE) for _ in '12')
    maps, kernel = x.view(4, 64, 16, 16), w.view(64, 64, 4, 4)
    cases: List[Tuple[str, bool, Callable, Tuple[Tensor, Tensor]]] = [
        ('products', products_use_tf32(), torch.matmul, (x, w)),
        ('convolutions', convolutions_use_tf32(), F.conv2d, (maps, kernel)),
    ]
    for kind, says_yes, function, factors in cases:
        with check(f'TF32 of {kind} {setting}'):
            x, w = factors
            found = error(function(x, w), function(x.double(), w.double()))
            wrong = (found > 1e-5) != says_yes
            note = f'error {found:.2g}, said: {says_yes}'
            report(f'TF32 of {kind} {setting}, said wrongly', float(wrong), 0, note)


def graphs() -> None:
    """CUDA graphs, which must not read what other image sizes replace."""
    if not GPU:
        print('Skipped without a GPU: graphs')
        return
    for name in variants():
        with check(f'graph {name}'), torch.no_grad(), without_tf32(), ops(name):
            model = MLLA(NANO).to(DEVICE).eval()
            x = torch.randn(2, 3, 64, 96, device=DEVICE)
            graph = CudaGraph(partial(model, x))
            x.copy_(torch.randn_like(x))
            report(f'graph {name}', worst(graph(), model(x)), 1e-5)
            for size in ((96, 64), (128, 128), (160, 96)):
                model(torch.randn(2, 3, *size, device=DEVICE))
            # What the graph reads may have been freed. Then NaN overwrites it here.
            junk = [
                torch.full((2**k,), float('nan'), device=DEVICE) for k in range(6, 22)
            ]
            found = [output.clone() for output in graph()]
            del junk
            value = worst(found, model(x))
            report(f'graph {name} after other image sizes', value, 1e-5)


CHECKS = (env, golden, grads, shapes, models, inout, graphs)


def main() -> None:
    warnings.filterwarnings('ignore')
    checks = {function.__name__: function for function in CHECKS}
    names = sys.argv[1:] or list(checks)
    if not set(names) <= set(checks):
        sys.exit(__doc__)
    for name in names:
        begin = time.monotonic()
        with check(name):
            checks[name]()
        print(f'--- {name}: {time.monotonic() - begin:.0f} s', flush=True)
    if failed:
        print(f'{len(failed)} failed: {", ".join(failed)}')
        sys.exit(1)
    print('All passed')


if __name__ == '__main__':
    main()
