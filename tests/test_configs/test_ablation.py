# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The rows of the paper's analysis, in configs/classification/ablation."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from mlla_mm.checks.config import check_config
from mlla_mm.checks.monitors import check_monitors, metric_keys
from mlla_mm.datasets.digits import make_imagenet
from mlla_mm.evaluation.comparison import compare_with_paper
from mlla_mm.evaluation.complexity import count_complexity
from mlla_mm.evaluation.published import PublishedModel, published_models

from ..processes import ROOT
from ..test_evaluation.work_dirs import add_session

pytest.importorskip('mmpretrain')

FOLDER = ROOT / 'configs' / 'classification' / 'ablation'
BASELINE = 'la-swin-t_8xb128_in1k'
#: Parameters and GFLOPs of an assembly that was written from the paper's text alone.
COUNTS = {
    BASELINE: (28_265_032, 4.462),
    'la-swin-t_input-gate_8xb128_in1k': (28_539_016, 4.505),
    'la-swin-t_forget-gate_8xb128_in1k': (28_680_328, 4.826),
    'la-swin-t_shortcut_8xb128_in1k': (28_269_448, 4.462),
    'la-swin-t_no-normalization_8xb128_in1k': (28_265_032, 4.461),
    'la-swin-t_single-head_8xb128_in1k': (24_226_504, 3.859),
    'la-swin-t_block-all_8xb128_in1k': (28_479_688, 4.674),
    'la-swin-t_block-sub_8xb128_in1k': (30_470_152, 4.822),
    'la-swin-t_ape_8xb128_in1k': (29_695_048, 4.462),
    'la-swin-t_lepe_8xb128_in1k': (28_309_192, 4.475),
    'la-swin-t_cpe_8xb128_in1k': (28_309_192, 4.475),
    'la-swin-t_rope_8xb128_in1k': (28_265_032, 4.462),
}


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def read(name: str) -> Config:
    return Config.fromfile(FOLDER / f'{name}.py')


def test_there_is_no_other_row():
    assert {path.stem for path in FOLDER.glob('*_in1k.py')} == COUNTS.keys()


@pytest.mark.parametrize('name', COUNTS)
def test_counts(name):
    counted = count_complexity(read(name))
    parameters, gflops = COUNTS[name]
    assert counted.parameters == parameters
    assert counted.flops / 1e9 == pytest.approx(gflops, rel=1e-3)
    published = published_models()[name]
    assert counted.parameters == published.parameters
    assert counted.flops == pytest.approx(published.flops, abs=5e5)
    # A single scan of 32 states: 9 * tokens * channels * 32, by stage.
    scans = sum(
        depth * 9 * (56 // 2**i) ** 2 * (96 * 2**i) * 32
        for i, depth in enumerate((2, 2, 6, 2))
    )
    assert counted.scan_flops == (scans if 'forget' in name else 0)


@pytest.mark.parametrize('name', COUNTS)
def test_a_row_differs_from_the_baseline_in_its_backbone(name):
    row, baseline = read(name), read(BASELINE)
    row.model.backbone = baseline.model.backbone
    assert row.to_dict() == baseline.to_dict()


def test_recipe_is_that_of_mlla_without_mesa():
    cfg = read(BASELINE)
    mlla = Config.fromfile(FOLDER.parent / 'mlla-t_8xb128_in1k.py')
    assert cfg.model.type == 'ImageClassifier'
    assert mlla.model.pop('mesa_weight')
    for part in ('type', 'backbone', 'head'):
        head = cfg.model.pop(part), mlla.model.pop(part)
    assert {**head[0], 'in_channels': 512} == head[1]
    # 4e-3 at 4096 images.
    assert cfg.optim_wrapper.optimizer.lr == 4e-3 * 1024 / 4096
    keys = cfg.optim_wrapper.paramwise_cfg.pop('custom_keys')
    assert all(rule == dict(decay_mult=0.0) for rule in keys.values())
    assert cfg.default_hooks.pop('mesa') == dict(type='NoHook')
    assert mlla.default_hooks.pop('mesa') == dict(type='MESAHook')
    assert cfg.default_hooks.checkpoint.pop('save_best') == 'accuracy/top1'
    del mlla.default_hooks.checkpoint['save_best']
    assert cfg.to_dict() == mlla.to_dict()


@pytest.mark.parametrize('name', COUNTS)
def test_checks_of_the_start(name):
    cfg = read(name)
    check_config(cfg)
    check_monitors(cfg)
    # Without an average there is no metric of it.
    assert metric_keys(cfg) == ['accuracy/top1', 'accuracy/top5']


@pytest.mark.parametrize(
    'row, last, count',
    [('forget-gate', 'A_log', 12), ('shortcut', 'D', 12), ('ape', 'ape', 12)],
)
def test_weight_decay_by_name(row, last, count):
    cfg = read(f'la-swin-t_{row}_8xb128_in1k')
    model = MODELS.build(cfg.model)
    # The mixed-precision wrapper exists with a GPU alone.
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale')
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decays = {
        id(p): group['weight_decay']
        for group in optimizer.param_groups
        for p in group['params']
    }
    of_row = 0
    for name, p in model.named_parameters():
        kind = name.split('.')[-1]
        of_row += kind == last
        without = p.dim() <= 1 or kind in ('bias', 'A_log', 'D', 'ape')
        assert decays.pop(id(p)) == (0 if without else 0.05), name
    assert of_row == count
    assert not decays


@pytest.mark.parametrize('name', COUNTS)
def test_every_parameter_is_trained(name):
    """DistributedDataParallel would wait for one without a gradient."""
    from mmpretrain.structures import DataSample

    cfg = read(name)
    if 'ape' in cfg.model.backbone:
        cfg.model.backbone.ape = 32
    model = MODELS.build(cfg.model)
    model.init_weights()
    data = dict(
        inputs=[torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)] * 2,
        data_samples=[DataSample().set_gt_label(i) for i in range(2)],
    )
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    # As many nats as a guess among 1000 classes.
    assert 6 < losses['loss'].item() < 8
    losses['loss'].backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name


def test_training(tmp_path):
    """The best checkpoint is kept, and there is no average."""
    root = make_imagenet(tmp_path / 'data', train=8, val=4, size=32)
    cfg = read('la-swin-t_shortcut_8xb128_in1k')
    cfg.work_dir = cfg.experiment_name = str(tmp_path / 'work')
    cfg.model.backbone.arch = dict(
        embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    )
    cfg.model.head.update(in_channels=64, num_classes=10)
    cfg.model.data_preprocessor.num_classes = 10
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root)
        loader.dataset.metainfo = dict(classes=tuple('0123456789'))
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 1
    cfg.param_scheduler.warmup = 0
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale')
    Runner.from_cfg(cfg).train()
    (best,) = (tmp_path / 'work').glob('best_*.pth')
    assert best.name == 'best_accuracy_top1_epoch_1.pth'
    checkpoint = torch.load(best, weights_only=False)
    assert 'state_dict_ema' not in checkpoint
    assert 'backbone.layers.0.blocks.0.attn.D' in checkpoint['state_dict']


# What the pages show.


def tables(path: Path) -> dict:
    """Cells of the table rows of a page that link to a config, by its name."""
    text = path.read_text()
    targets = dict(re.findall(r'^\[(\w+)\]: (\S+)$', text, re.M))
    rows = {}
    for line in text.splitlines():
        found = re.search(r'\]\((\S+_in1k)\.py\)', line) or re.search(
            r'^\| \[[^]]*\]\[(\w+)\]', line
        )
        if line.startswith('|') and found:
            name = Path(targets.get(found[1], found[1])).name.split('.')[0]
            assert name not in rows, name
            rows[name] = [cell.strip() for cell in line.strip('|').split('|')]
    return rows


def of_the_paper(model: PublishedModel) -> list:
    baseline = published_models()[BASELINE]
    assert model.paper_throughput and baseline.paper_throughput
    speed = model.paper_throughput / baseline.paper_throughput
    return [
        f'{model.paper_parameters / 1e6:g} M',
        f'{model.paper_flops / 1e9:g} G',
        f'{model.metrics["Top 1 Accuracy"]:.1f}',
        '1' if model == baseline else f'{speed:.3f}',
    ]


def test_the_readme_shows_the_metafile():
    rows = tables(FOLDER / 'README.md')
    assert rows.keys() == COUNTS.keys()
    for name, cells in rows.items():
        model = published_models()[name]
        parameters, flops, top1, speed = of_the_paper(model)
        assert cells[1:7] == [
            f'{model.parameters / 1e6:.2f} M',
            parameters,
            f'{model.flops / 1e9:.2f} G',
            flops,
            top1,
            speed,
        ], name


def test_the_page_shows_the_metafile_and_the_switches():
    rows = tables(ROOT / 'docs' / 'analysis.md')
    assert rows.keys() == COUNTS.keys()
    baseline = read(BASELINE).model.backbone.to_dict()
    for name, (_, switch, _, *figures) in rows.items():
        assert figures == of_the_paper(published_models()[name]), name
        code = re.search('`(.*)`', switch)
        switches = eval(f'dict({code[1]})') if code else {}
        expected = read(name).model.backbone.to_dict()
        if switch.endswith('and more'):
            assert expected.items() >= switches.items()
        else:
            assert {**baseline, **switches} == expected, name


def test_comparison_knows_the_rows(tmp_path):
    name = 'la-swin-t_lepe_8xb128_in1k'
    log = [
        dict(loss=2.0, epoch=300, iter=1, step=1),
        {'accuracy/top1': 80.9, 'step': 300},
    ]
    add_session(tmp_path, '1', name, entries=log, length=300)
    report, within = compare_with_paper([tmp_path], tmp_path)
    assert not within
    assert re.search(
        rf'\| {name} .*\| 80\.90 +\| 81\.6 +\| \*\*-0\.70\*\* \(beyond 0\.5\)', report
    )
