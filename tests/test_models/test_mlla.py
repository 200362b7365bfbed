# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import io

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.batchnorm import _BatchNorm

from mlla_mm.compat import pytorch
from mlla_mm.engine.compile import compile_backbone
from mlla_mm.models import MLLA
from mlla_mm.models.layers import MLLABlock, PatchMerging, Stem

from .. import reference
from ..compiler import needs_compiler

NANO = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


def build_reference(arch: str, **kwargs) -> MLLA:
    model = MLLA(arch, **kwargs).eval()
    model.load_state_dict(reference.official_weights(f'mlla-{arch}_downstream'))
    return model


@pytest.mark.parametrize(
    'arch, size, batch, run',
    [
        ('t', '96x132', 2, ''),
        ('t', '75x101', 2, ''),
        ('s', '64x96', 1, ''),
        ('b', '64x96', 1, ''),
        ('t', '75x101', 2, 'naive'),
        pytest.param(
            *('t', '96x132', 2, 'compiled'), marks=[pytest.mark.slow, needs_compiler]
        ),
    ],
)
@torch.no_grad()
def test_features_equal_the_authors(arch, size, batch, run, monkeypatch):
    model = build_reference(arch)
    if run == 'naive':
        monkeypatch.setenv('MLLA_OPS', 'naive')
    elif run == 'compiled':
        compile_backbone(model)
    for i, feature in enumerate(model(reference.image(size, batch))):
        expected = reference.recorded(f'feat{i}_mlla-{arch}_{size}')
        assert feature.shape == expected.shape
        assert reference.relative_error(feature, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_features_on_a_gpu():
    model, x = build_reference('t').cuda(), reference.image('96x132', 2).cuda()
    with torch.no_grad():
        features = model(x)
        with torch.autocast('cuda', dtype=torch.float16):
            half = model(x)
    for i, feature in enumerate(features):
        expected = reference.recorded(f'feat{i}_mlla-t_96x132').cuda()
        assert reference.relative_error(feature, expected) < 1e-4
        assert reference.relative_error(half[i], expected) < 2e-2


@pytest.mark.parametrize(
    'arch, parameters',
    [('tiny', 23_880_096), ('small', 42_502_944), ('base', 95_216_304)],
)
def test_parameter_count(arch, parameters):
    assert sum(p.numel() for p in MLLA(arch).parameters()) == parameters


def test_is_registered_in_the_root_registry():
    assert isinstance(MODELS.build(dict(type='MLLA', arch=NANO)), MLLA)


@pytest.mark.parametrize('size', [(1, 1), (2, 7), (5, 1), (33, 65), (32, 96)])
def test_any_image_size(size):
    model = MLLA(NANO).eval()
    with torch.no_grad():
        features = model(torch.rand(2, 3, *size))
    height, width = (-(-side // 4) for side in size)
    for i, feature in enumerate(features):
        assert feature.shape == (2, 16 * 2**i, height, width)
        assert feature.is_contiguous()
        assert feature.isfinite().all()
        height, width = -(-height // 2), -(-width // 2)


def test_gradients_lie_in_memory_as_the_weights_do():
    """DistributedDataParallel warns of other gradients and copies them."""
    model = MLLA(NANO)
    sum(feature.sum() for feature in model(torch.rand(2, 3, 32, 64))).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.stride() == weight.stride(), name


def test_images_of_a_batch_do_not_mix():
    model = MLLA(NANO).eval()
    images = torch.rand(3, 3, 40, 56)
    with torch.no_grad():
        together = model(images)
        alone = [model(x[None]) for x in images]
    for i, feature in enumerate(together):
        torch.testing.assert_close(
            feature, torch.cat([a[i] for a in alone]), rtol=1e-4, atol=1e-5
        )


def test_gradients_against_finite_differences():
    model = MLLA(dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)))
    model = model.double().eval()
    x = torch.rand(1, 3, 9, 14, dtype=torch.float64, requires_grad=True)
    parameters = [
        model.layers[0].blocks[0].attn.qk.weight,
        model.layers[0].blocks[0].dwc.weight,
        model.layers[1].blocks[0].act_proj.weight,
        model.layers[0].downsample.conv[1].conv.bias,
    ]

    def loss(*_):
        return sum(feature.square().mean() for feature in model(x))

    assert torch.autograd.gradcheck(loss, (x, *parameters), fast_mode=True)


def test_float32_gradients_equal_float64():
    model = MLLA(NANO).train()
    double = copy.deepcopy(model).double()
    x = torch.rand(2, 3, 61, 45)

    def gradients(network, images):
        sum(f.square().mean() for f in network(images)).backward()
        return {name: p.grad for name, p in network.named_parameters()}

    expected = gradients(double, x.double())
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in gradients(model, x).items():
        error = (gradient.double() - expected[name]).norm()
        assert error < 1e-4 * expected[name].norm() + 1e-6 * whole, name


def test_checkpointing_changes_nothing():
    x = torch.rand(2, 3, 64, 48)
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = MLLA(NANO, drop_path_rate=0.5, drop_rate=0.1, with_cp=with_cp).train()
        loss = sum(feature.square().mean() for feature in model(x))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss, gradients, model.state_dict()))
    (loss, gradients, state), (loss_cp, gradients_cp, state_cp) = results
    assert torch.equal(loss, loss_cp)
    for name in gradients:
        torch.testing.assert_close(
            gradients[name], gradients_cp[name], rtol=1e-4, atol=1e-7
        )
    # BatchNorm statistics are updated once, not again in the backward pass.
    assert all(torch.equal(state[key], state_cp[key]) for key in state)


def test_checkpointing_saves_memory():
    def saved_bytes(with_cp):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        model = MLLA(NANO, with_cp=with_cp).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.rand(1, 3, 64, 64))
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


@needs_compiler
@pytest.mark.parametrize(
    'training', [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_a_compiled_model_has_few_graphs(training):
    """At most four for 20 image sizes. The graphs are only counted."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = MLLA(NANO).train(training)
    compile_backbone(model, backend=counter)
    sizes = torch.randint(33, 200, (20, 2)).tolist()
    for size in sizes:
        image = torch.randn(2, 3, *size)
        plain = MLLA(NANO).train(training)
        plain.load_state_dict(model.state_dict())
        with torch.set_grad_enabled(training):
            for actual, expected in zip(model(image), plain(image)):
                assert reference.relative_error(actual, expected) < 1e-5
    assert 1 <= counter.frame_count <= 4


@needs_compiler
@pytest.mark.slow
def test_compiled_training_on_several_image_sizes():
    """With PyTorch's own compiler, forward and backward, for one stage."""
    torch._dynamo.reset()
    plain = MLLA(NANO, out_indices=0).double().train()
    compiled = MLLA(NANO, out_indices=0).double().train()
    compile_backbone(compiled)
    compiled.load_state_dict(plain.state_dict())
    for size in ((64, 64), (96, 70), (33, 150)):
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        gradients = []
        for model in (compiled, plain):
            model.zero_grad()
            (model(image)[0] ** 2).sum().backward()
            used = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            gradients.append(torch.cat(used))
        assert reference.relative_error(*gradients) < 1e-5


def test_on_the_meta_device():
    """FSDP builds models there that are too large for one process."""
    with torch.device('meta'):
        model = MLLA(NANO, drop_path_rate=0.1)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.state_dict().keys() == MLLA(NANO).state_dict().keys()


def test_compilers_that_are_too_old_are_refused(monkeypatch):
    monkeypatch.setattr(pytorch, 'COMPILES', False)
    with pytest.raises(ValueError, match='compile needs PyTorch 2.2 or newer'):
        compile_backbone(MLLA(NANO))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_autocast_stays_finite(dtype, training, scale):
    model = MLLA(NANO).train(training)
    x = scale * torch.randn(2, 3, 64, 96)
    try:
        with torch.autocast('cpu', dtype=dtype):
            features = model(x)
    except RuntimeError as error:
        # PyTorch has float16 on CPUs from version 2.3.
        if dtype is torch.float16 and torch.__version__ < '2.3':
            pytest.skip(str(error))
        raise
    assert all(feature.isfinite().all() for feature in features)
    sum(feature.float().mean() for feature in features).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_is_close_to_float32():
    model = build_reference('t')
    x = reference.image('96x132', 2)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            actual = model(x)
    for a, e in zip(actual, expected):
        assert reference.relative_error(a, e) < 5e-2


def test_out_indices():
    model = MLLA(NANO).eval()
    x = torch.rand(1, 3, 64, 64)
    some = MLLA(NANO, out_indices=(-2, 0)).eval()
    some.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        every, two = model(x), some(x)
    assert len(two) == 2
    assert torch.equal(two[0], every[0])
    assert torch.equal(two[1], every[2])
    assert not hasattr(some, 'norm3')


def test_every_trainable_parameter_gets_a_gradient():
    # DistributedDataParallel waits for a gradient of each parameter.
    model = MLLA(NANO, out_indices=(0, 1))
    sum(f.mean() for f in model(torch.rand(2, 3, 64, 64))).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen_stages):
    model = MLLA(NANO, frozen_stages=frozen_stages, drop_path_rate=0.3).train()
    state = copy.deepcopy(model.state_dict())
    features = model(torch.rand(2, 3, 64, 64))
    if frozen_stages < 4:
        sum(f.square().mean() + f[:, 0].mean() for f in features).backward()
        trainable = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(trainable, lr=1.0).step()

    def frozen(name):
        stages = [f'layers.{i}.' for i in range(frozen_stages)]
        stages += [f'norm{i}.' for i in range(frozen_stages)]
        stages += ['patch_embed.'] if frozen_stages >= 0 else []
        return name.startswith(tuple(stages))

    for name, p in model.named_parameters():
        assert p.requires_grad != frozen(name), name
    for name, value in model.state_dict().items():
        if frozen(name):
            # The statistics of BatchNorm are frozen, too.
            assert torch.equal(value, state[name]), name
    assert any(not torch.equal(v, state[k]) for k, v in model.state_dict().items()) == (
        frozen_stages < 4
    )


def test_norm_eval():
    model = MLLA(NANO, norm_eval=True).train()
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert batch_norms
    assert not any(m.training for m in batch_norms)
    assert all(m.weight.requires_grad for m in batch_norms)
    assert model.layers[0].blocks[0].training
    model.norm_eval = False
    assert all(m.training for m in batch_norms if model.train())


def test_initialisation():
    model = MLLA('tiny')
    block = model.layers[2].blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.fc1.bias.abs().max() == 0
    assert torch.equal(block.norm1.weight, torch.ones(256))
    # Convolutions keep PyTorch's default, uniform in +-1/sqrt(fan_in).
    bound = block.dwc.weight.detach().abs().max()
    assert 0.3 < bound <= 1 / 3


def test_seeded_networks_start_alike():
    """Convolutions are drawn as they are made: in the order of the forward pass."""
    torch.manual_seed(0)
    model = MLLA(NANO)
    torch.manual_seed(0)
    stem = Stem(3, 16, 0.0)
    stages = []
    for i, (depth, heads) in enumerate(zip(NANO['depths'], NANO['num_heads'])):
        blocks = nn.ModuleList(MLLABlock(16 * 2**i, heads) for _ in range(depth))
        merging = PatchMerging(16 * 2**i) if i < 3 else nn.Identity()
        stages.append(nn.ModuleDict(dict(blocks=blocks, downsample=merging)))
    parts = nn.ModuleDict(dict(patch_embed=stem, layers=nn.ModuleList(stages)))
    expected = {k: v for k, v in parts.state_dict().items() if v.dim() == 4}
    assert len(expected) > 30
    actual = model.state_dict()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_drop_path_rises_linearly():
    model = MLLA('tiny', drop_path_rate=0.17)
    rates = [b.drop_path.drop_prob for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(18)], abs=1e-6)


def test_state_does_not_depend_on_the_image_size():
    model = MLLA(NANO).eval()
    before = {key: value.shape for key, value in model.state_dict().items()}
    with torch.no_grad():
        model(torch.rand(1, 3, 320, 64))
    assert {key: value.shape for key, value in model.state_dict().items()} == before
    assert not [key for key in before if 'rope' in key or 'rot' in key]
    torch.save(model, io.BytesIO())


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='huge'), "Unknown arch 'huge'"),
        (dict(arch=dict(embed_dims=16)), 'exactly the keys'),
        (dict(arch={**NANO, 'extra': 1}), 'exactly the keys'),
        (dict(arch={**NANO, 'embed_dims': 18}), 'multiple of 4'),
        (dict(arch={**NANO, 'embed_dims': '16'}), 'multiple of 4'),
        (dict(arch={**NANO, 'depths': (1, 1, 1)}), 'depths must be four ints'),
        (dict(arch={**NANO, 'depths': (1, 0, 1, 1)}), 'depths must be positive'),
        (dict(arch={**NANO, 'num_heads': (1, 2, 3, 8)}), r'num_heads\[2\] = 3'),
        (dict(arch=NANO, out_indices=(0, 4)), 'out_indices must lie'),
        (dict(arch=NANO, out_indices=()), 'one or more ints'),
        (dict(arch=NANO, out_indices='3'), 'one or more ints'),
        (dict(arch=NANO, out_indices=(3, -1)), 'twice'),
        (dict(arch=NANO, in_channels=0), 'in_channels'),
        (dict(arch=NANO, frozen_stages=5), 'frozen_stages'),
        (dict(arch=NANO, in_channels=3.0), 'in_channels must be an int'),
        (dict(arch=NANO, with_cp='false'), 'with_cp must be True or False'),
        (dict(arch=NANO, drop_path_rate=1.5), 'drop_path_rate'),
        (dict(arch=NANO, drop_path_rate=1.0), 'drop_path_rate must be .* below 1'),
        (dict(arch=NANO, drop_rate=-0.1), 'drop_rate'),
        (dict(arch=NANO, mlp_ratio=0), 'mlp_ratio'),
        (dict(arch=NANO, mlp_ratio=float('inf')), 'mlp_ratio'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MLLA(**kwargs)


@pytest.mark.parametrize(
    'images, message',
    [
        (torch.rand(1, 1, 32, 32), 'Expected non-empty images'),
        (torch.rand(3, 32, 32), 'Expected non-empty images'),
        (torch.rand(0, 3, 32, 32), 'Expected non-empty images'),
        (torch.rand(1, 3, 0, 32), 'Expected non-empty images'),
        (torch.ones(1, 3, 32, 32).byte(), 'floating-point numbers, got torch.uint8'),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        MLLA(NANO)(images)
