# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import Dataset

from mlla_mm.datasets.digits import make_imagenet
from mlla_mm.engine.parts import kind_of

from ..pipelines import of_the_toolbox

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'classification'
DATA = ROOT / 'tests' / 'data' / 'training'
RECIPES = ['t_8xb128', 's_8xb64', 'b_8xb64']


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'mlla-{name}.py')


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'digits'
    return make_imagenet(out, train=20, val=10, size=32)


@pytest.mark.parametrize(
    'name, drop_path_rate, mesa_weight, batch, lr',
    [
        ('t_8xb128', 0.2, 1.0, 128, 1e-3),
        ('s_8xb64', 0.3, 1.5, 64, 5e-4),
        ('b_8xb64', 0.5, 2.0, 64, 5e-4),
    ],
)
def test_recipe(name, drop_path_rate, mesa_weight, batch, lr):
    cfg = read(f'{name}_in1k')
    model = MODELS.build(cfg.model)
    assert model.mesa_weight == mesa_weight
    last_block = model.backbone.layers[-1].blocks[-1]
    assert last_block.drop_path.drop_prob == pytest.approx(drop_path_rate)
    assert model.backbone.init_cfg is None
    assert model.head.loss_module.label_smooth_val == 0.1
    assert model.head.loss_module.mode == 'original'
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8 * batch)
    assert cfg.optim_wrapper.optimizer.lr == lr == 5e-4 * 8 * batch / 512
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler.end == 300
    assert cfg.randomness.diff_rank_seed
    # fp16 with a gradient scaler in training, float32 in validation.
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert not cfg.val_cfg.get('fp16')
    hook = HOOKS.build(cfg.default_hooks.mesa)
    assert (hook.decay, hook.start) == (None, 0.25)


@pytest.mark.parametrize('name', RECIPES)
def test_without_mesa_nothing_else_changes(name):
    cfg, without = read(f'{name}_in1k'), read(f'{name}-no-mesa_in1k')
    assert without.model.pop('mesa_weight') == 0
    assert cfg.model.pop('mesa_weight') > 0
    assert without.to_dict() == cfg.to_dict()


@pytest.mark.parametrize('name', RECIPES)
def test_no_decay_on_one_dimensional_parameters(name):
    cfg = read(f'{name}_in1k')
    model = MODELS.build(cfg.model)
    # The mixed-precision wrapper exists with a GPU alone.
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale')
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert wrapper.clip_grad_kwargs == dict(max_norm=5.0)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in wrapper.optimizer.param_groups:
        assert (group['betas'], group['eps']) == ((0.9, 0.999), 1e-8)
        for p in group['params']:
            name = names.pop(id(p))
            flat = p.dim() <= 1 or name.endswith('.bias')
            assert group['weight_decay'] == (0 if flat else 0.05), name
    assert not names


class Images(Dataset):
    """As many as ImageNet has for training."""

    def __len__(self):
        return 1_281_167

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize('name, iterations', zip(RECIPES, [1251, 2502, 2502]))
def test_iterations_per_epoch_on_8_gpus(name, iterations, monkeypatch):
    monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (3, 8))
    cfg = read(f'{name}_in1k').train_dataloader
    cfg.dataset = Images()
    cfg.update(num_workers=0, persistent_workers=False)
    assert len(Runner.build_dataloader(cfg, seed=0)) == iterations


def test_augmentation_of_the_recipe():
    cfg = read('t_8xb128_in1k')
    steps = Compose(cfg.train_dataloader.dataset.pipeline).transforms
    _, crop, flip, rand_augment, _, erasing = steps
    assert crop.scale == (224, 224)
    assert crop.crop_ratio_range == (0.08, 1.0)
    assert crop.aspect_ratio_range == (3 / 4, 4 / 3)
    assert (crop.backend, crop.interpolation) == ('torch', 'bicubic')
    assert (flip.prob, flip.direction) == (0.5, 'horizontal')

    assert rand_augment.num_policies == 2
    rgb_mean = (124, 116, 104)
    # timm's rand-m9-mstd0.5-inc1: its operations and their strength at level 10.
    strongest = dict(
        Rotate=30,
        Posterize=0,
        Solarize=0,
        SolarizeAdd=110,
        ColorTransform=0.9,
        Contrast=0.9,
        Brightness=0.9,
        Sharpness=0.9,
        Shear=0.3,
        Translate=0.45,
    )
    seen = []
    for step in rand_augment.transforms:
        kind = type(step).__name__
        seen.append((kind, getattr(step, 'direction', None)))
        assert step.prob == 0.5
        if kind in strongest:
            assert step.magnitude_range[1] == strongest[kind]
            assert (step.magnitude_level, step.total_level) == (9, 10)
            assert step.magnitude_std == 0.5
        if kind in ('Rotate', 'Shear', 'Translate'):
            assert step.interpolation == 'bicubic'
            assert tuple(step.pad_val[::-1]) == rgb_mean
            assert step.random_negative_prob == 0.5
    # At 224 pixels a translation of 0.45 is one of 100 pixels.
    assert int(0.45 * crop.scale[0]) == 100
    geometric = {
        (kind, direction)
        for kind in ('Shear', 'Translate')
        for direction in ('horizontal', 'vertical')
    }
    others = ('AutoContrast', 'Equalize', 'Invert', *strongest)
    assert sorted(seen, key=str) == sorted(
        geometric
        | {(kind, None) for kind in others if kind not in ('Shear', 'Translate')},
        key=str,
    )

    assert erasing.prob == 0.25
    assert erasing.area_ratio_range == (0.02, 1 / 3)
    assert erasing.aspect_range == pytest.approx((0.3, 1 / 0.3))
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

    preprocessor = MODELS.build(cfg.model).data_preprocessor
    assert preprocessor.to_rgb
    assert preprocessor.mean.flatten().tolist() == pytest.approx(mean)
    assert preprocessor.std.flatten().tolist() == pytest.approx(std)
    mixup, cutmix = preprocessor.batch_augments.augments
    assert (type(mixup).__name__, mixup.alpha) == ('ReversedMixup', 0.8)
    assert (type(cutmix).__name__, cutmix.alpha) == ('ReversedCutMix', 1.0)
    # Always one of the two, with equal chance.
    assert preprocessor.batch_augments.probs is None


@pytest.mark.parametrize('name', ['image.jpg', 'image_orientation6.jpg'])
def test_evaluation_of_the_recipe(name):
    """As the authors' transform, which does not turn images as their EXIF data say."""
    golden = np.load(DATA / 'preprocessing.npz')
    cfg = read('t_8xb128_in1k')
    pipeline = Compose(cfg.val_dataloader.dataset.pipeline)
    info = dict(img_path=str(DATA / name), gt_label=0)
    decoded = pipeline.transforms[0](dict(info))['img']
    assert decoded.mean((0, 1))[::-1] == pytest.approx(golden['decoded_mean'], rel=1e-9)
    sample = pipeline(info)
    pixels = sample['inputs'].numpy()[::-1].transpose(1, 2, 0)
    difference = np.abs(pixels.astype(int) - golden['evaluation_pixels'])
    # PyTorch and Pillow round some values differently.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005
    preprocessor = MODELS.build(cfg.model).data_preprocessor
    batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
    actual = preprocessor(batch)['inputs'][0, :, 3::9, 3::9].numpy()
    difference = np.abs(actual - golden['evaluation_input'])
    assert difference.max() <= 1 / 57 + 1e-6
    assert (difference > 1e-6).mean() < 0.005


def of_mmpretrain(pipeline: list) -> list:
    """The pipeline with mmpretrain's own transforms, and Pillow."""
    steps = of_the_toolbox(pipeline)
    for step in steps:
        if step['type'] in ('RandomResizedCrop', 'ResizeEdge'):
            step['backend'] = 'pillow'
    return steps


def test_training_images_are_those_of_mmpretrain():
    pipeline = read('t_8xb128_in1k').train_dataloader.dataset.pipeline
    ours, theirs = Compose(pipeline), Compose(of_mmpretrain(pipeline))
    moments, differences = [], []
    for seed in range(256):
        images = []
        for steps in (ours, theirs):
            np.random.seed(seed)
            sample = steps(dict(img_path=str(DATA / 'image.jpg'), gt_label=0))
            images.append(sample['inputs'].double())
        moments.append([[image.mean(), image.std()] for image in images])
        differences.append((images[0] - images[1]).abs().mean())
    # Grey values of 255. Pillow, as ours, cuts off where mmpretrain rounds.
    ours, theirs = np.array(moments).transpose(1, 0, 2)
    assert np.abs(ours - theirs).max() < 1.5
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.1
    assert np.median(differences) < 0.05
    assert np.max(differences) < 3


@pytest.mark.parametrize(
    'name, mode',
    [
        ('grey.JPEG', 'L'),
        ('cmyk.JPEG', 'CMYK'),
        ('alpha.png', 'RGBA'),
        ('sixteen.png', 'I;16'),
        ('palette.png', 'P'),
        ('named.JPEG', 'RGB'),
    ],
)
def test_unusual_files_are_decoded_as_by_default(tmp_path, name, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == 'I;16':
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 255)
    elif mode == 'RGBA':
        image.putalpha(Image.fromarray(pixels[..., 0]))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    image.save(tmp_path / name, format='PNG' if name == 'named.JPEG' else None)
    pipeline = read('t_8xb128_in1k').train_dataloader.dataset.pipeline
    load = Compose(pipeline[:1])
    actual = load(dict(img_path=str(tmp_path / name)))['img']
    assert actual.shape == (30, 40, 3) and actual.dtype == np.uint8
    assert np.array_equal(actual, mmcv.imread(tmp_path / name))


def test_reads_the_class_folders_and_the_lists(tmp_path, digits):
    cfg = read('t_8xb128_in1k').train_dataloader.dataset
    cfg.update(data_root=str(digits), metainfo=dict(classes=tuple('0123456789')))
    listed = DATASETS.build(cfg)
    assert len(listed) == 20
    assert listed[3]['inputs'].shape == (3, 224, 224)
    (tmp_path / 'train').symlink_to(digits / 'train')
    cfg.data_root = str(tmp_path)
    walked = DATASETS.build(cfg)

    def content(dataset):
        samples = (dataset.get_data_info(i) for i in range(len(dataset)))
        return sorted((Path(s['img_path']).name, s['gt_label']) for s in samples)

    assert content(walked) == content(listed)
    (tmp_path / 'meta').mkdir()
    first = (digits / 'meta' / 'train.txt').read_text().splitlines()[:3]
    (tmp_path / 'meta' / 'train.txt').write_text('\n'.join(first))
    assert len(DATASETS.build(cfg)) == 3


def fine_tune(name: str, digits: Path, work_dir: Path, size: int) -> dict:
    """Run a fine-tuning config on a few small digits; returns the last checkpoint."""
    cfg = read(name)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = name
    nano = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    cfg.model.backbone.arch = nano
    cfg.model.head.update(in_channels=64, num_classes=10)
    cfg.model.data_preprocessor.num_classes = 10
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(digits)
        if loader.dataset.type == 'ImageNet':
            loader.dataset.metainfo = dict(classes=tuple('0123456789'))
        steps = {kind_of(step): step for step in loader.dataset.pipeline}
        if split == 'train':
            assert steps['RandomResizedCrop']['scale'] == size
        else:
            assert steps['CenterCrop']['crop_size'] == size
            assert steps['ResizeEdge']['scale'] == int(size * 256 / 224)
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 1
    cfg.param_scheduler.warmup = 0
    # The mixed-precision wrapper exists with a GPU alone.
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale')
    return cfg


def last_checkpoint(work_dir: Path) -> dict:
    return torch.load(work_dir / 'epoch_1.pth', map_location='cpu', weights_only=False)


def test_schedule_at_384():
    """Swin Transformer's: rates for 512 images, from 2e-8 to 2e-5, and down to 2e-7."""
    cfg = read('t_8xb64-ft_in1k-384')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (2e-5, 1e-8)
    scheduler = cfg.param_scheduler
    assert scheduler.warmup == 5
    assert scheduler.end == cfg.train_cfg.max_epochs == 30
    assert scheduler.start_ratio * optimizer.lr == pytest.approx(2e-8)
    assert scheduler.min_ratio * optimizer.lr == pytest.approx(2e-7)
    assert cfg.train_dataloader.batch_size == 64
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=512)


def test_fine_tuning_at_384(tmp_path, digits):
    name = 't_8xb64-ft_in1k-384'
    cfg = fine_tune(name, digits, tmp_path, 384)
    assert cfg.load_from == 'work_dirs/mlla-t_8xb128_in1k/epoch_300.pth'
    start = MODELS.build(cfg.model).state_dict()
    cfg.load_from = str(tmp_path / 'start.pth')
    torch.save(dict(state_dict=start), cfg.load_from)
    # So that what is left of the start shows.
    cfg.optim_wrapper.optimizer.lr = 0.0
    runner = Runner.from_cfg(cfg)
    runner.train()
    trained = last_checkpoint(tmp_path)['state_dict']
    for key, _ in runner.model.named_parameters():
        assert torch.equal(trained[key], start[key]), key


def test_fine_tuning_on_folders(tmp_path, digits):
    cfg = fine_tune('t_1xb64-ft_folders', digits, tmp_path, 224)
    assert cfg.model.backbone.init_cfg.checkpoint == 'data/MLLA_T.pth'
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
    path = tmp_path / 'backbone.pth'
    torch.save(dict(model=backbone.state_dict()), path)
    cfg.model.backbone.init_cfg.checkpoint = str(path)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert set(last_checkpoint(tmp_path)) >= {'state_dict', 'state_dict_ema'}
    names = {id(p): name for name, p in runner.model.named_parameters()}
    rates = {
        names[id(p)]: group['initial_lr']
        for group in runner.optim_wrapper.optimizer.param_groups
        for p in group['params']
    }
    # The stem, 4 blocks, and what follows them.
    assert rates['head.fc.weight'] == rates['backbone.norm3.weight'] == 1e-4
    last = rates['backbone.layers.3.blocks.0.mlp.fc1.weight']
    assert last == pytest.approx(1e-4 * 0.8)
    assert rates['backbone.patch_embed.conv1.conv.weight'] == pytest.approx(
        1e-4 * 0.8**5
    )


def test_metafile():
    meta = yaml.safe_load((CONFIGS / 'metafile.yml').read_text())
    readme = (CONFIGS / 'README.md').read_text()
    parameters = dict(t=24_392_200, s=43_015_048, b=95_983_960)
    flops = dict(t=4.149e9, s=7.278e9, b=16.157e9)
    top1 = dict(t=83.5, s=84.4, b=85.3)
    without_mesa = dict(t=83.3, s=84.2, b=85.0)
    for model in meta['Models']:
        config = ROOT / model['Config']
        assert config.is_file()
        assert config.stem == model['Name']
        assert config.name in readme
        size = model['Name'][len('mlla-')]
        assert model['Metadata']['Parameters'] == parameters[size]
        assert model['Metadata']['FLOPs'] == pytest.approx(flops[size], rel=1e-3)
        (result,) = model['Results']
        expected = without_mesa if 'no-mesa' in model['Name'] else top1
        assert result['Metrics'] == {'Top 1 Accuracy': expected[size]}
    assert len(meta['Models']) == 6
