# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Data sets in archives: the same samples, checks and errors as from files."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner

from mlla_mm.checks.data import check_data, require_data
from mlla_mm.datasets.archives import folder_files, write_archive, write_index
from mlla_mm.datasets.corrupt_images import CorruptImageError
from mlla_mm.reproducible.seeding import SAMPLE, Draw, SeededDataset

from ..bad_data import CLS, DET, MAKE, SEG, assert_says, config, truncate
from ..nano import CONFIGS
from ..processes import ROOT

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

# What takes the place of each folder in the data sets' prefixes.
FOLDERS = {DET: ('images',), SEG: ('images', 'maps'), CLS: ('train', 'val')}
PREFIX = {
    DET: dict(img='images.tar'),
    SEG: dict(img_path='images.tar', seg_map_path='maps.tar'),
}
FIRST = {DET: 'images.tar/0.jpg', SEG: 'images.tar/0.jpg', CLS: 'train.tar/0/image.png'}


def pack(scope, root) -> None:
    """Put the images into archives. There are no files left."""
    for name in FOLDERS[scope]:
        archive = root / f'{name}.tar'
        write_archive(root / name, folder_files(root / name), archive)
        write_index(archive)
        shutil.rmtree(root / name)


def archived(scope, root):
    cfg = config(scope, root)
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.data_prefix = PREFIX.get(scope, f'{split}.tar')
    return cfg


@pytest.fixture(params=[DET, SEG, CLS])
def scope(request):
    return request.param


def seeded(cfg, **options):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return SeededDataset(cfg.train_dataloader.dataset, **options)


def samples(dataset):
    return [dataset[Draw(i, (SAMPLE, 0, 0, i))] for i in range(len(dataset))]


def relative_path(sample):
    return '/'.join(Path(sample['data_samples'].img_path).parts[-2:])


def test_samples_and_checks(scope, tmp_path):
    MAKE[scope](tmp_path)
    cfg = config(scope, tmp_path)
    expected, report = samples(seeded(cfg)), check_data(cfg, 'train', 'val')
    pack(scope, tmp_path)
    cfg = archived(scope, tmp_path)
    found = samples(seeded(cfg))
    assert len(found) == len(expected) > 2
    for sample, other in zip(found, expected):
        assert torch.equal(sample['inputs'], other['inputs'])
        assert sample['data_samples'].img_path.startswith(str(tmp_path))
    # Paths aside, annotations are equal.
    for key in ('gt_label', 'gt_sem_seg.data', 'gt_instances.bboxes.tensor'):
        for sample, other in zip(found, expected):
            ours, theirs = sample['data_samples'], other['data_samples']
            for name in key.split('.'):
                ours, theirs = getattr(ours, name, None), getattr(theirs, name, None)
            assert ours is None or torch.equal(ours, theirs)
    again = check_data(cfg, 'train', 'val')
    assert again.counts == report.counts
    problems = [finding.problem.replace('.tar', '') for finding in again.findings]
    assert problems == [finding.problem for finding in report.findings]


def test_a_picture_that_is_cut_off_is_named(scope, tmp_path):
    MAKE[scope](tmp_path)
    truncate(tmp_path / FIRST[scope].replace('.tar', ''))
    pack(scope, tmp_path)
    cfg = archived(scope, tmp_path)
    dataset = seeded(cfg)
    with pytest.raises(CorruptImageError) as caught:
        dataset[0]
    assert_says(caught.value, f'{tmp_path / FIRST[scope]} is truncated')
    assert dataset[1] is not None
    found = [finding.problem for finding in check_data(cfg, 'train').findings]
    assert any('is truncated' in problem for problem in found)
    skipping = seeded(cfg, skip_corrupt_images=True)
    with pytest.warns(UserWarning, match='Skipped'):
        assert skipping[0] is not None
    assert skipping.skipped.value >= 1


def test_a_missing_picture_is_named(tmp_path):
    MAKE[DET](tmp_path)
    (tmp_path / 'images/1.jpg').unlink()
    pack(DET, tmp_path)
    with pytest.raises(ValueError) as caught:
        require_data(archived(DET, tmp_path), 'train')
    assert_says(caught.value, 'images.tar', '1.jpg')


def test_an_archive_without_an_index(scope, tmp_path):
    MAKE[scope](tmp_path)
    pack(scope, tmp_path)
    index = next(tmp_path.glob(f'{FOLDERS[scope][0]}.tar.index'))
    index.unlink()
    with pytest.raises(ValueError, match='has no index'):
        require_data(archived(scope, tmp_path), 'train')


# A spawned worker imports everything anew.
@pytest.mark.parametrize(
    'method', ['fork', pytest.param('spawn', marks=pytest.mark.slow)]
)
def test_workers(tmp_path, method):
    """They read an archive that this process has opened and read before."""
    MAKE[CLS](tmp_path)
    pack(CLS, tmp_path)
    dataset = seeded(archived(CLS, tmp_path))
    expected = samples(dataset)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=2,
        sampler=[Draw(i, (SAMPLE, 0, 0, i)) for i in range(len(dataset))],
        num_workers=2 if method == 'fork' else 1,
        collate_fn=list,
        multiprocessing_context=method,
    )
    found = [sample for batch in loader for sample in batch]
    assert len(found) == len(expected)
    for sample, other in zip(found, expected):
        assert torch.equal(sample['inputs'], other['inputs'])
        assert relative_path(sample) == relative_path(other)
    again = samples(dataset)
    assert torch.equal(again[0]['inputs'], expected[0]['inputs'])


class _BatchesHook(Hook):
    """Keeps what a training gets, and its losses."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        labels = [int(x.gt_label) for x in data_batch['data_samples']]
        self.seen.append((data_batch['inputs'].clone(), labels, outputs['loss']))


def train(cfg, work_dir):
    cfg.work_dir = str(work_dir)
    cfg.train_dataloader.update(batch_size=4, num_workers=1)
    cfg.train_dataloader.dataset.indices = 8
    cfg.train_cfg.max_epochs = 2
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.default_hooks.checkpoint = None
    cfg.randomness = dict(seed=3)
    runner, hook = Runner.from_cfg(cfg), _BatchesHook()
    runner.register_hook(hook)
    runner.train()
    return hook.seen


def test_a_training(digits_imagenet, tmp_path):
    """Two epochs, with a worker: the same batches and losses as from files."""
    root = tmp_path / 'data'
    shutil.copytree(digits_imagenet, root)
    expected = train(config(CLS, root), tmp_path / 'files')
    pack(CLS, root)
    found = train(archived(CLS, root), tmp_path / 'archive')
    assert len(found) == len(expected) == 4
    for (images, labels, loss), (others, other_labels, other_loss) in zip(
        found, expected
    ):
        assert torch.equal(images, others)
        assert labels == other_labels
        assert torch.equal(loss, other_loss)
    # The second epoch is not the first one again.
    assert not torch.equal(found[0][0], found[2][0])


def test_the_example_of_the_page(tmp_path):
    """The config reads archives that the tool makes where the page says."""
    page = (ROOT / 'docs' / 'data_speed.md').read_text()
    pattern = r"<!-- example: archive -->\n```python\n_base_ = '\./(.*?)'\n(.*?)```"
    base, code = re.search(pattern, page, re.S).groups()
    path = tmp_path / 'archive.py'
    path.write_text(f"_base_ = '{CONFIGS / 'classification' / base}'\n{code}")
    cfg = Config.fromfile(path)
    MAKE[CLS](tmp_path)
    pack(CLS, tmp_path)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(tmp_path)
        loader.dataset.metainfo = dict(classes=tuple('0123456789'))
    cfg.model.head.num_classes = 10
    report = require_data(cfg, 'train', 'val', 'test')
    assert [counts.images for counts in report.counts.values()] == [10, 10, 10]
    assert seeded(cfg)[0]['inputs'].shape == (3, 224, 224)
    # COCO's and ADE20K's prefixes, as the tests above have them.
    assert "data_prefix=dict(img='train2017.tar')" in page
    assert "img_path='images.tar/training'" in page


def test_label_maps_without_a_list(tmp_path):
    """mmseg lists the images of a folder; an archive lists the same."""
    MAKE[SEG](tmp_path)
    with DefaultScope.overwrite_default_scope(SEG):
        files = DATASETS.build(config(SEG, tmp_path).train_dataloader.dataset)
        before = [info['img_path'] for info in map(files.get_data_info, range(3))]
        pack(SEG, tmp_path)
        packed = DATASETS.build(archived(SEG, tmp_path).train_dataloader.dataset)
    after = [info['img_path'] for info in map(packed.get_data_info, range(len(packed)))]
    assert [path.replace('.tar', '') for path in after] == before
