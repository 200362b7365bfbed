# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.utils.flop_counter import FlopCounterMode

from mlla_mm.evaluation.complexity import (
    COLUMNS,
    Complexity,
    complexity_row,
    count_complexity,
    scan_note,
)
from mlla_mm.evaluation.published import published_models
from mlla_mm.ops.scan import decayed_scan

CONFIGS = Path(__file__).parents[2] / 'configs'
#: The architecture's own counts, independent of what the metafiles say.
SHEET = {
    'mlla-t_8xb128_in1k': 4.149e9,
    'mlla-s_8xb64_in1k': 7.278e9,
    'mlla-b_8xb64_in1k': 16.157e9,
    'mask-rcnn_mlla-t_fpn_1x_coco': 254.7e9,
}


def test_classifier_is_that_of_the_architecture_sheet():
    pytest.importorskip('mmpretrain')
    model = published_models()['mlla-t_8xb128_in1k']
    counted = count_complexity(Config.fromfile(model.config))
    assert counted.shape == (224, 224)
    assert counted.parameters == model.parameters
    assert counted.flops == pytest.approx(SHEET[model.name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    'model', list(published_models().values()), ids=lambda m: m.name
)
def test_metafiles_hold_the_counts(model):
    cfg = Config.fromfile(model.config)
    pytest.importorskip(cfg.default_scope)
    counted = count_complexity(cfg)
    assert counted.parameters == model.parameters
    assert counted.flops == pytest.approx(model.flops, rel=1e-3)
    if model.name in SHEET:
        assert counted.flops == pytest.approx(SHEET[model.name], rel=1e-3)
    if model.paper_flops:
        # Both are rounded, and not everyone counts the same operations.
        assert counted.flops == pytest.approx(model.paper_flops, rel=0.015)


NANO = {
    'mmpretrain': ('classification/mlla-nano_digits', (64, 64)),
    'mmseg': ('segmentation/upernet_mlla-nano_digits', (96, 96)),
    'mmdet': ('detection/mask-rcnn_mlla-nano_fpn_digits', (128, 160)),
}


@pytest.mark.parametrize('scope', NANO)
def test_counts_are_those_of_another_counter(scope):
    """PyTorch's own counts convolutions and matrix products, twice a multiply-add."""
    pytest.importorskip(scope)
    name, shape = NANO[scope]
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    before = cfg.pretty_text
    counted = count_complexity(cfg, shape)
    assert cfg.pretty_text == before
    assert counted.shape == shape
    with DefaultScope.overwrite_default_scope(scope):
        model_cfg = Config.fromfile(CONFIGS / f'{name}.py').model
        if scope == 'mmseg':
            for head in ('decode_head', 'auxiliary_head'):
                model_cfg[head].norm_cfg.type = 'BN'
        model = MODELS.build(model_cfg).eval()
        image = torch.rand(1, 3, *shape)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            if scope == 'mmdet':
                # Without proposals: the part before them.
                features = model.extract_feat(image)
                model.rpn_head(features)
            else:
                model(image)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    expected = counter.get_total_flops() / 2
    found = counted.flops
    if scope == 'mmdet':
        found -= flops_by_module(counted.table)['roi_head']
    # MMEngine counts norms, pooling and upsampling as well.
    assert expected < found < 1.04 * expected


def flops_by_module(table: str) -> dict:
    """The numbers of the table, '| module | parameters | FLOPs | activations |'."""
    rows = [[cell.strip() for cell in line.split('|')] for line in table.splitlines()]
    units = dict(K=1e3, M=1e6, G=1e9)
    return {
        row[1]: float(row[3][:-1]) * units[row[3][-1]]
        for row in rows
        if len(row) == 6 and row[3][-1:] in units
    }


@pytest.mark.parametrize(
    'scope, shape', [('mmpretrain', (224, 224)), ('mmseg', (512, 2048))]
)
def test_images_of_the_paper(scope, shape):
    arch = dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    cfg = Config(dict(model=dict(type='MLLA', arch=arch), default_scope=scope))
    assert count_complexity(cfg).shape == shape


def test_heads_get_the_proposals_of_the_paper():
    """Of its image 1000 go through the box head, 100 through the mask head."""
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(CONFIGS / f'{NANO["mmdet"][0]}.py')
    cfg.model.test_cfg.rpn.update(nms_pre=1000, max_per_img=1000)  # as in the recipe
    counted = count_complexity(cfg, depth=3)
    assert counted.shape == (800, 1280)
    flops = flops_by_module(counted.table)
    # Two linear layers on 64 channels of 7x7, then 11 scores and 10 boxes.
    box = 256 * (64 * 7**2 + 256 + 11 + 4 * 10)
    assert flops['roi_head.bbox_head'] == pytest.approx(1000 * box, rel=0.01)
    # Two 3x3 convolutions on 14x14, 2x2 upsampling, a mask of each class.
    mask = 14**2 * 64 * (2 * 9 * 64 + 4 * 64) + 28**2 * 64 * 10
    assert flops['roi_head.mask_head'] == pytest.approx(100 * mask, rel=0.01)


def count_with(**token_mixer) -> Complexity:
    backbone = dict(
        type='LinearAttentionSwin',
        arch=dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
        token_mixer=token_mixer,
    )
    return count_complexity(
        Config(dict(model=backbone, default_scope='mmengine')), (64, 96)
    )


def test_recurrence_of_the_forget_gate():
    without, gate = count_with(), count_with(forget_gate=True)
    assert without.scan_flops == 0
    # Tokens, channels, and channels of a head, which are its states.
    maps = [(16 * 24, 8, 8), (8 * 12, 16, 8), (4 * 6, 32, 16), (2 * 3, 64, 16)]
    scan = sum(9 * n * c * d for n, c, d in maps)
    assert gate.scan_flops == scan
    # Steps: W_1 and W_2 with a column of W_1 for 16 channels. The recurrence takes the
    # place of two products.
    steps = sum(n * 2 * c * -(-c // 16) for n, c, _ in maps)
    products = sum(2 * n * c * d for n, c, d in maps)
    assert gate.flops - without.flops == scan + steps - products
    # Both have outputs of n * c. The baseline also has d * c, the gate two layers.
    layers = sum(n * (c + -(-c // 16)) for n, c, _ in maps)
    states = sum(c * d for _, c, d in maps)
    assert gate.activations - without.activations == layers - states
    twice = count_with(forget_gate=True, decayed_normalizer=True)
    assert twice.scan_flops == 2 * scan
    note = scan_note(gate._replace(scan_flops=412e6), 'mine')
    assert note.startswith('mine: 0.41 G of the FLOPs')


def test_counting_leaves_the_recurrence_as_it_is():
    ones = torch.ones(1, 3, 1, 1)
    count_with(forget_gate=True)
    y = decayed_scan(ones, ones, ones, ones, -torch.full((1, 1, 1), 1e-9))
    assert y.flatten().tolist() == pytest.approx([1, 2, 3])


def test_row():
    model = published_models()['mlla-t_8xb128_in1k']
    counted = Complexity((224, 224), 24_392_200, 4_149_000_000, 25_600_000, '')
    assert complexity_row(counted, model.name, model) == [
        model.name, '224x224', '24.39 M', '25 M', '4.15 G', '4.2 G', '-1.21 %', '25.6 M'
    ]  # fmt: skip
    without = complexity_row(counted, 'mine', None)
    assert [without[i] for i in (3, 5, 6)] == ['-', '-', '-']
    assert len(without) == len(COLUMNS)


def test_errors():
    cfg = Config(dict(model=dict(type='MLLA'), default_scope='mmagic'))
    with pytest.raises(ValueError, match='needs model in the config'):
        count_complexity(Config(dict()), (64, 64))
    with pytest.raises(ValueError, match="'mmagic'.*--shape"):
        count_complexity(cfg)
    with pytest.raises(ValueError, match=r'positive, got \(0, 64\)'):
        count_complexity(cfg, (0, 64))


def test_softmax_attention_counts_its_products():
    """In the place of linear attention, whose products are of other sizes."""
    pytest.importorskip('mmpretrain')
    name = 'classification/ablation/la-swin-t_8xb128_in1k.py'
    cfg = Config.fromfile(CONFIGS / name)
    cfg.model.backbone.arch = dict(
        embed_dims=16, depths=(1, 1, 1, 1), num_heads=(2, 4, 8, 16)
    )
    cfg.model.head.in_channels = 128
    linear = count_complexity(cfg, (64, 96)).flops
    cfg.model.backbone.token_mixer = dict(type='SoftmaxAttention')
    softmax = count_complexity(cfg, (64, 96)).flops
    stages = [(16 * 24, 16), (8 * 12, 32), (4 * 6, 64), (2 * 3, 128)]
    # Q K^T and its product with V, against K^T V and its product with Q.
    assert softmax - linear == sum(2 * n * c * (n - 8) for n, c in stages)
