# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

import pytest
import torch

from mlla_mm.models import MLLA

from ..nano import NANO


@pytest.fixture
def export(call_tool, nano):
    def run(scope, out, *arguments, **options):
        _, checkpoint = nano(scope)
        return call_tool(
            'tools/export.py', NANO[scope], checkpoint, '--format', 'torchscript',
            '--shape', '64', '64', '--out', out, *arguments, **options,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    'scope, arguments, shapes',
    [
        ('mmpretrain', (), [(3, 10)]),
        ('mmpretrain', ('--part', 'classifier'), [(3, 10)]),
        ('mmpretrain', ('--part', 'backbone', '--fuse-conv-bn'), [(3, 256, 2, 2)]),
        ('mmseg', ('--logits', '--no-normalize'), [(3, 40, 50), (3, 11, 40, 50)]),
        ('mmdet', ('--part', 'backbone'), [(3, 32, 10, 13), (3, 64, 5, 7)]),
    ],
)
def test_parts(export, scope, arguments, shapes, tmp_path):
    out = tmp_path / 'model.pt'
    text = export(scope, out, *arguments).stdout
    assert f'{out} (' in text and 'Largest differences to the model' in text
    files = {'metadata.json': ''}
    program = torch.jit.load(str(out), _extra_files=files)
    inputs = [torch.rand(3, 3, 40, 50)]
    metadata = json.loads(files['metadata.json'])
    if scope == 'mmseg':
        inputs.append(torch.zeros(2, dtype=torch.long))
        assert metadata['normalization'] == 'outside'
    if '--part' in arguments:
        assert metadata == {}
    else:
        assert json.loads(metadata['preprocessing'])[0]['type'] == 'Resize'
    found = [tuple(x.shape) for x in program(*inputs)]
    assert found[: len(shapes)] == shapes
    # BatchNorm is in the convolutions.
    has_variances = any('running_var' in name for name in program.state_dict())
    assert has_variances == ('--fuse-conv-bn' not in arguments)


def test_options_of_the_config(export, tmp_path):
    mode = ('--cfg-options', 'model.test_cfg.mode=slide')
    result = export('mmseg', tmp_path / 'model.pt', *mode, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: model.test_cfg.mode = 'slide'")
    assert "Set model.test_cfg.mode='whole'" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('--part', 'classifier'), 'MaskRCNN is not a classifier: export it with part'),
        (('--logits',), 'logits is an option of segmentors, and this is detection'),
        (('--int8',), 'int8 is an option of onnx'),
    ],
)
def test_errors_are_one_line(export, arguments, message, tmp_path):
    result = export('mmdet', tmp_path / 'model.pt', *arguments, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f'Error: {message}')
    assert result.stderr.count('\n') == 1


def test_a_config_of_a_backbone_alone(call_tool, tmp_path):
    """It needs no default_scope."""
    arch = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    config, checkpoint = tmp_path / 'a.py', tmp_path / 'a.pth'
    config.write_text(f'model = dict(type="MLLA", arch={arch}, out_indices=0)')
    torch.save(dict(state_dict=MLLA(arch, out_indices=0).state_dict()), checkpoint)
    text = call_tool(
        'tools/export.py', config, checkpoint, '--format', 'torchscript', '--shape',
        64, 64,
    ).stdout  # fmt: skip
    assert f'{tmp_path}/a_backbone.pt (' in text
    exported = tmp_path / 'a.onnx'
    exported.write_bytes(b'')
    result = call_tool(
        'tools/export.py', config, exported, '--format', 'torchscript', check=False
    )
    assert 'is an exported file already: give its checkpoint' in result.stderr
