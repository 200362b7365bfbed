# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pickle

import pytest
import torch

from mlla_mm.models import MLLA, load_pretrained

from .. import reference


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.fixture(scope='module')
def official():
    """What the authors' ImageNet file of MLLA-T holds."""
    weights = reference.official_weights('mlla-t')
    for name in reference.official_rotations('mlla-t'):
        weights[name] = torch.zeros(3, 3, 2)
    return weights


@pytest.mark.parametrize('layout', ['model', 'state_dict', 'bare', 'backbone'])
def test_official_classifier_starts_a_backbone(tmp_path, official, layout):
    content = {
        'model': {'model': official},
        'state_dict': {'state_dict': official},
        'bare': official,
        'backbone': {'state_dict': {f'backbone.{k}': v for k, v in official.items()}},
    }[layout]
    path = tmp_path / 'MLLA_T.pth'
    torch.save(content, path)
    model = MLLA('tiny', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with torch.no_grad():
        model.norm3.weight.fill_(1)
    model.init_weights()
    state = model.state_dict()
    for name, value in official.items():
        if not name.startswith(('norm.', 'head.')) and 'rope' not in name:
            assert torch.equal(state[name], value), name
    # The classifier's norm is not an output norm of ours.
    assert torch.equal(model.norm3.weight, torch.ones(512))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda w: w.pop('layers.0.blocks.0.cpe1.weight'), 'cpe1.weight: missing'),
        (lambda w: w.update(extra=torch.zeros(1)), 'extra: not part of this backbone'),
        (
            lambda w: w.update({'layers.1.blocks.0.norm1.bias': torch.zeros(3)}),
            r'norm1.bias: \(3,\) in the file, \(128,\) in the backbone',
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, official, change, message):
    weights = dict(official)
    change(weights)
    torch.save({'model': weights}, tmp_path / 'x.pth')
    model = MLLA('tiny')
    before = model.layers[3].blocks[3].mlp.fc2.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, tmp_path / 'x.pth')
    assert torch.equal(model.layers[3].blocks[3].mlp.fc2.weight, before)


def test_files_that_are_no_checkpoints(tmp_path):
    model = MLLA(dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))
    with pytest.raises(FileNotFoundError, match='7a19712877cb4242889c'):
        load_pretrained(model, tmp_path / 'MLLA_T.pth')
    (tmp_path / 'text.pth').write_text('<html>')
    with pytest.raises(ValueError, match='damaged, or not a checkpoint'):
        load_pretrained(model, tmp_path / 'text.pth')
    torch.save({'epoch': 3}, tmp_path / 'empty.pth')
    with pytest.raises(ValueError, match='holds no weights'):
        load_pretrained(model, tmp_path / 'empty.pth')
    whole = tmp_path / 'whole.pth'
    torch.save(model.state_dict(), whole)
    (tmp_path / 'half.pth').write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match='damaged, or not a checkpoint'):
        load_pretrained(model, tmp_path / 'half.pth')


def test_no_code_of_a_checkpoint_runs(tmp_path):
    proof = tmp_path / 'ran'
    torch.save({'model': Malicious(proof)}, tmp_path / 'bad.pth')
    model = MLLA(dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match='not a checkpoint of tensors alone'):
        load_pretrained(model, tmp_path / 'bad.pth')
    assert not proof.exists()
    pickle.loads(pickle.dumps(Malicious(proof)))  # it would have
    assert proof.exists()
