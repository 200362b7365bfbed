# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from torch import nn

from mlla_mm import get_model
from mlla_mm.compat import pytorch
from mlla_mm.export import (
    FORMATS,
    ExportError,
    Options,
    Part,
    export_model,
    formats,
    select_part,
)
from mlla_mm.models import MLLA, LinearAttentionSwin

from ..reference import relative_error
from .runners import skip_unless_supported

SMALL = Options((64, 96))
ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
# The smallest size, one with an odd side and a multiple of 4, and a larger one.
SIZES = [(33, 33), (52, 71), (224, 130)]


@pytest.fixture(scope='module')
def backbone():
    """Two stages with a patch merging between them. Four stages take a minute."""
    torch.manual_seed(0)
    model = MLLA(ARCH, out_indices=(0, 1)).eval()
    for name, value in model.state_dict().items():
        if name.endswith(('running_mean', 'bias')):
            nn.init.normal_(value, std=0.1)
        elif name.endswith('running_var'):
            nn.init.uniform_(value, 0.5, 1.5)
    return select_part(model, 'backbone')


def check(part, run, sizes=SIZES):
    for batch, size in enumerate(sizes, 1):
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            expected, actual = part.module(images), run(images)
        assert len(actual) == len(expected)
        for one, other in zip(expected, actual):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_torchscript(backbone, tmp_path):
    path = tmp_path / 'below' / 'model.pt'
    error = export_model(backbone, 'torchscript', path, SMALL)
    assert 0 <= error['maps'] < 1e-5
    check(backbone, torch.jit.load(str(path)), [*SIZES, (1, 1), (7, 5)])


@pytest.mark.parametrize('format', FORMATS)
def test_batch_norm_in_the_convolutions(backbone, format, tmp_path):
    """A fused model exports. It has one block, which is quick."""
    skip_unless_supported(format)
    model = MLLA(ARCH, out_indices=0).eval()
    model.load_state_dict(backbone.module.state_dict(), strict=False)
    image = torch.randn(2, 3, 50, 39)
    with torch.no_grad():
        (expected,) = model(image)
        (actual,) = fuse_conv_bn(model)(image)
    assert relative_error(actual, expected) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    part = select_part(model, 'backbone')
    assert export_model(part, format, tmp_path / 'model', SMALL)['maps'] < 1e-5


def test_onnx(backbone, tmp_path):
    skip_unless_supported('onnx')
    import onnxruntime

    path = tmp_path / 'model.onnx'
    error = export_model(backbone, 'onnx', path, SMALL)
    assert 0 <= error['maps'] < 1e-5
    session = onnxruntime.InferenceSession(str(path))
    assert [node.name for node in session.get_inputs()] == ['images']
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    names = [node.name for node in session.get_outputs()]
    assert names == ['stage0', 'stage1']

    def run(images):
        outputs = session.run(None, {'images': images.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    check(backbone, run, [*SIZES, (1, 1), (7, 5)])
    # There is no second file with weights.
    assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']


def test_torch_export(backbone, tmp_path):
    skip_unless_supported('torch-export')
    path = tmp_path / 'model.pt2'
    error = export_model(backbone, 'torch-export', path, SMALL)
    assert 0 <= error['maps'] < 1e-5
    run = torch.export.load(str(path)).module()
    check(backbone, run)
    with pytest.raises(AssertionError, match='33'):
        run(torch.rand(1, 3, 32, 64))


#: All designs that attend to all tokens at once, and all encodings for any size.
PARALLEL = dict(
    block_design='sub',
    cpe=2,
    token_mixer=dict(input_gate=True, shortcut=True, lepe=True, rope=True),
)


@pytest.mark.parametrize(
    'format, options',
    [
        ('torchscript', PARALLEL),
        ('torchscript', {}),
        ('torchscript', dict(block_design='all', expansion=2)),
        (
            'torchscript',
            dict(token_mixer=dict(num_heads=1, qk_head_dims=4, normalization=False)),
        ),
        ('onnx', PARALLEL),
        ('onnx', {}),
        pytest.param('torch-export', PARALLEL, marks=pytest.mark.slow),
    ],
)
def test_study(format, options, tmp_path):
    skip_unless_supported(format)
    stages = (0, 1) if format == 'torchscript' else 0
    model = LinearAttentionSwin(ARCH, out_indices=stages, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.3 * (parameter.dim() == 1), std=0.2)
    part = select_part(model, 'backbone')
    path = tmp_path / f'model{FORMATS[format]}'
    assert export_model(part, format, path, SMALL)['maps'] < 1e-5
    if format == 'torchscript':
        check(part, torch.jit.load(str(path)), [*SIZES, (1, 1), (7, 5)])


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(token_mixer=dict(forget_gate=True)), 'forget_gate=False'),
        (dict(ape=(64, 96)), r'ape = \(64, 96\) names the only image size'),
    ],
)
def test_study_that_is_for_one_number_of_tokens(options, message):
    model = LinearAttentionSwin(ARCH, **options).eval()
    with pytest.raises(ExportError, match=message):
        select_part(model, 'backbone')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('format', FORMATS)
def test_on_a_gpu(format, tmp_path):
    """The model stays where it is, and programs of PyTorch run there."""
    skip_unless_supported(format)
    model = MLLA(ARCH, out_indices=0).eval().cuda()
    part = select_part(model, 'backbone')
    assert export_model(part, format, tmp_path / 'model', SMALL)['maps'] < 1e-3
    assert next(model.parameters()).is_cuda
    if format == 'torchscript':
        (found,) = torch.jit.load(str(tmp_path / 'model'))(
            torch.rand(1, 3, 64, 64).cuda()
        )
        assert found.is_cuda


def test_tracing_leaves_eager_execution_as_it_was(backbone, tmp_path):
    images = torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        before = backbone.module(images)
        export_model(
            backbone,
            'torchscript',
            tmp_path / 'a.pt',
            SMALL,
        )
        after = backbone.module(images)
    for one, other in zip(before, after):
        assert torch.equal(one, other)


class FixedSize(nn.Module):
    """Its trace is right for one image size only."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return (self.scale * images / int(images.shape[2]),)


class NoSize(FixedSize):
    def forward(self, images):
        raise KeyError('no such key')


@pytest.mark.parametrize(
    'module, message',
    [
        (FixedSize(), r"exported model's y for an image of \(109, 90\) differ by"),
        (NoSize(), "cannot export this model to torchscript: KeyError: 'no such key'"),
    ],
)
def test_what_does_not_export(module, message, tmp_path):
    path = tmp_path / 'model.pt'
    with pytest.raises(ExportError, match=message):
        export_model(
            Part(module.eval(), 3, {'y': {}}), 'torchscript', path, Options((64, 64))
        )
    assert not path.exists()


class Unknown(FixedSize):
    """It has an operator that no opset has."""

    def forward(self, images):
        return (torch.linalg.svdvals(self.scale * images),)


def test_an_operator_that_does_not_export(tmp_path):
    skip_unless_supported('onnx')
    part = Part(Unknown().eval(), 3, {'y': {}})
    with pytest.raises(ExportError, match='aten::linalg_svd') as error:
        export_model(part, 'onnx', tmp_path / 'model', Options((64, 64)))
    assert 'cannot export this model to onnx' in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_file_of_before_stays_if_the_export_fails(backbone, tmp_path):
    path = tmp_path / 'model.pt'
    path.write_bytes(b'of before')
    with pytest.raises(ExportError):
        part = Part(FixedSize().eval(), 3, {'y': {}})
        export_model(part, 'torchscript', path, Options((64, 64)))
    assert path.read_bytes() == b'of before'
    assert list(tmp_path.iterdir()) == [path]
    export_model(backbone, 'torchscript', path, SMALL)
    assert path.stat().st_size > 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    'format, options, message',
    [
        ('coreml', SMALL, "Unknown format 'coreml': choose from"),
        ('torchscript', Options((64, 32)), 'shape must be at least 33 x 33'),
        ('onnx', Options(opset=16), 'opset must be from 17 to 20, got 16'),
        ('onnx', Options(opset=99), 'opset must be from 17 to 20, got 99'),
        ('torchscript', Options(int8=True), 'int8 is an option of onnx'),
    ],
)
def test_wrong_options(backbone, format, options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_model(backbone, format, tmp_path / 'model', options)
    assert not list(tmp_path.iterdir())


def test_training_mode(tmp_path):
    """Exporters would leave a model in another mode than it was in."""
    part = select_part(MLLA(ARCH, out_indices=0), 'backbone')
    with pytest.raises(ExportError, match=r'training mode: call its eval\(\)'):
        export_model(part, 'torchscript', tmp_path / 'model')
    model = get_model('mlla-t')
    assert select_part(model, 'classifier').module.training
    part = select_part(model.eval(), 'classifier')
    assert not any(module.training for module in part.module.modules())


def test_what_is_missing(backbone, tmp_path, monkeypatch):
    path = tmp_path / 'model'
    with pytest.raises(ExportError, match='is a folder: give the path of a file'):
        export_model(backbone, 'torchscript', tmp_path)
    monkeypatch.setattr(formats, 'find_spec', lambda name: None)
    with pytest.raises(ExportError, match='needs onnx, onnxruntime.*pip install'):
        export_model(backbone, 'onnx', path)
    monkeypatch.setattr(pytorch, 'TELLS_EXPORT', False)
    with pytest.raises(ExportError, match='needs PyTorch 2.7'):
        export_model(backbone, 'torch-export', path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('opset', [18, 20])
def test_opsets(backbone, opset, tmp_path):
    skip_unless_supported('onnx')
    import onnx

    path = tmp_path / 'model.onnx'
    export_model(backbone, 'onnx', path, Options((64, 96), opset))
    assert onnx.load(str(path)).opset_import[0].version == opset


@pytest.mark.parametrize(
    'device, available, expected',
    [
        (None, ['CPU'], ['CPU']),
        ('cpu', ['CUDA', 'CPU'], ['CPU']),
        ('cuda:3', ['CUDA', 'CPU'], [3, 'CPU']),
        ('cuda:3', ['CPU'], "'cuda:3' cannot be used.*CPU.*install onnxruntime-gpu"),
        ('meta', ['CUDA', 'CPU'], "'meta' cannot be used"),
    ],
)
def test_devices(device, available, expected, tmp_path, monkeypatch):
    """What onnxruntime is asked for. A GPU alone could run it."""
    onnxruntime = pytest.importorskip('onnxruntime')
    suffix, asked = 'ExecutionProvider', []
    names = [f'{name}{suffix}' for name in available]
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: names)

    def session(path, options, providers):
        asked.extend(providers)
        raise OSError('stop here')

    monkeypatch.setattr(onnxruntime, 'InferenceSession', session)
    message = expected if isinstance(expected, str) else 'stop here'
    with pytest.raises(ExportError, match=message):
        formats.onnx_runner(tmp_path / 'model.onnx', device)
    found = [
        x.removesuffix(suffix) if isinstance(x, str) else x[1]['device_id']
        for x in asked
    ]
    assert found == ([] if isinstance(expected, str) else expected)


def test_int8(backbone, tmp_path):
    """The linear layers, and no others, become int8; the outputs stay close."""
    skip_unless_supported('onnx')
    import onnx
    import onnxruntime

    exact, small = tmp_path / 'exact.onnx', tmp_path / 'int8.onnx'
    export_model(backbone, 'onnx', exact, SMALL)
    export_model(backbone, 'onnx', small, Options((64, 96), int8=True))
    linear = [
        name
        for name, module in backbone.module.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(('layers.0', 'layers.1'))
    ]
    kinds = [node.op_type for node in onnx.load(str(small)).graph.node]
    assert kinds.count('MatMulInteger') == len(linear) > 0
    assert kinds.count('Conv') > 0
    images = torch.randn(1, 3, 65, 80)
    with torch.no_grad():
        expected = backbone.module(images)
    session = onnxruntime.InferenceSession(str(small))
    for one, other in zip(expected, session.run(None, {'images': images.numpy()})):
        error = relative_error(torch.from_numpy(other), one)
        assert 1e-5 < error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize('format', FORMATS)
def test_published_network(format, tmp_path):
    skip_unless_supported(format)
    model = get_model('mlla-t').eval()
    for part in ('backbone', 'classifier'):
        path = tmp_path / f'{part}{FORMATS[format]}'
        assert export_model(select_part(model, part), format, path)['maps'] < 1e-5
