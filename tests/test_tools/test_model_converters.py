# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

import torch

from mlla_mm.checkpoints.reader import load_checkpoint_file

from .. import checkpoints, reference

TOOL = 'tools/model_converters/mlla_to_mm.py'


def test_official_classifier(call_tool, tmp_path):
    weights = reference.official_weights('mlla-t')
    average = {key: torch.ones_like(value) for key, value in weights.items()}
    source = tmp_path / 'training.pth'
    checkpoints.save_official_training(weights, source, state_dict_ema=average)
    for arguments, expected in (([], weights), (['--ema'], average)):
        output = call_tool(TOOL, source, tmp_path / 'mlla-t.pth', *arguments)
        path = Path(output.stdout.splitlines()[-1])
        assert path.parent == tmp_path
        assert path.name.startswith('mlla-t-')
        content = load_checkpoint_file(path)
        assert list(content) == ['state_dict']
        own = content['state_dict']
        assert len(own) == len(expected)
        for theirs, ours in {
            'norm.weight': 'backbone.norm3.weight',
            'head.bias': 'head.fc.bias',
            'layers.2.blocks.7.attn.qk.weight': (
                'backbone.layers.2.blocks.7.attn.qk.weight'
            ),
        }.items():
            assert torch.equal(own[ours], expected[theirs])


def test_errors(call_tool, tmp_path):
    bad, new = tmp_path / 'bad.pth', tmp_path / 'new.pth'
    content = checkpoints.attacks(tmp_path / 'ran')['deep in weights']
    checkpoints.save_pickle(content, bad, legacy=False)
    result = call_tool(TOOL, bad, new, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert str(bad) in result.stderr and '--trust-checkpoint' in result.stderr
    assert not (tmp_path / 'ran').exists()
    result = call_tool(TOOL, bad, new, '--trust-checkpoint', check=False)
    assert str(bad) in result.stderr and 'no weights' in result.stderr
    assert (tmp_path / 'ran').exists()
    assert not list(tmp_path.glob('new*'))
