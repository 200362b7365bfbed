# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.

import torch

from mlla_mm.models import MLLA

from ..nano import NANO


def test_classifier_and_backbone(call_tool, nano, tmp_path):
    _, checkpoint = nano('mmpretrain')
    out = tmp_path / 'model.pt'
    export = (
        *('tools/export.py', NANO['mmpretrain'], checkpoint),
        *('--format', 'torchscript', '--shape', '64', '64', '--out', out),
    )
    text = call_tool(*export).stdout
    assert f'{out}: classifier, differs from eager execution by' in text
    (logits,) = torch.jit.load(str(out))(torch.rand(1, 3, 40, 50))
    assert logits.shape == (1, 10)
    text = call_tool(*export, '--part', 'backbone', '--fuse-conv-bn').stdout
    assert f'{out}: backbone, differs from eager execution by' in text
    (features,) = torch.jit.load(str(out))(torch.rand(1, 3, 40, 50))
    assert features.shape == (1, 256, 2, 2)
    assert not [name for name in torch.jit.load(str(out)).state_dict() if 'var' in name]


def test_detectors_have_a_backbone_only(call_tool, nano, tmp_path):
    _, checkpoint = nano('mmdet')
    export = (
        *('tools/export.py', NANO['mmdet'], checkpoint),
        *('--format', 'torchscript', '--shape', '64', '64'),
    )
    result = call_tool(*export, '--part', 'classifier', check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ') and 'MaskRCNN' in result.stderr
    out = checkpoint.with_name('mmdet_backbone.pt')
    assert f'{out}: backbone' in call_tool(*export).stdout
    features = torch.jit.load(str(out))(torch.rand(1, 3, 40, 50))
    assert [len(x[0]) for x in features] == [32, 64, 128, 256]


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
    assert f'{tmp_path}/a_backbone.pt: backbone' in text
