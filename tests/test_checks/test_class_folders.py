# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Class folders and lists: the file, what is wrong, and the way out."""

import os

import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope

from mlla_mm.checks.class_folders import check_folders
from mlla_mm.checks.data import check_data, require_data
from mlla_mm.checks.source import Source

from ..bad_data import (
    CLS,
    PREFIX,
    assert_refused,
    assert_says,
    config,
    empty,
    rename,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


def write_list(content):
    def apply(root):
        (root / 'meta').mkdir()
        raw = content if isinstance(content, bytes) else content.encode()
        (root / 'meta/train.txt').write_bytes(raw)

    return apply


LIST, LINES = 'meta/train.txt', 'IMAGE LABEL'
FOLDER_ERRORS = {
    'no folder': (rename('train', 'training'), 'train', 'not found', PREFIX),
    'no class folders': (
        lambda root: [x.rename(root / f'val/{x.name}x') for x in root.glob('train/*')],
        'train', 'FOLDER/CLASS/IMAGE'),
    'a class folder too many': (
        lambda root: (root / 'train/-').mkdir(),
        'train', '11', '10 classes', '-, 0, 1 and 8 more', 'num_classes'),
    'empty list': (write_list(''), LIST, 'empty', LINES),
    'not UTF-8': (write_list(b'0/\xff.png 0'), LIST, 'UTF-8', LINES),
    'no labels': (write_list('0/image.png 0\n1/image.png\n'),
                  LIST, 'label from 0 to 9', 'line 2.', LINES),
    'labels out of range': (write_list('0/image.png 0\n1/image.png 10\n'),
                            LIST, 'label from 0 to 9', 'line 2.', LINES),
    'an empty last line': (write_list('0/image.png 0\n1/image.png 1\n\n'),
                           LIST, 'label from 0 to 9', 'line 3.', LINES),
    'absent image': (write_list('0/image.png 0\n1/picture.png 1\n'),
                     'train: 1/picture.png', PREFIX),
}  # fmt: skip


@pytest.mark.parametrize('case', FOLDER_ERRORS)
def test_class_folders(folders, case):
    spoil, *words = FOLDER_ERRORS[case]
    spoil(folders)
    assert_refused(CLS, folders, *words)


def test_images_of_class_folders(folders):
    (folders / 'train/3/image.png').unlink()
    empty(folders / 'train/4/image.png')
    (folders / 'train/5/\x1b[31m\n.png').write_bytes(b'')
    of_no_bytes, without = check_data(config(CLS, folders), 'train').findings
    assert_says(of_no_bytes.problem, f'{folders}/train', '4/image.png is empty')
    assert_says(of_no_bytes.problem, r'5/\x1b[31m\n.png is empty')
    assert of_no_bytes.problem.isprintable()
    assert_says(without.problem, 'no images: 3')


# Layouts of files, for CustomDataset.


def lay_out(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith('/'):
            (root / name).mkdir()
        else:
            (root / name).write_text(name)


def custom(root, num_classes=None, **options):
    """A config of a data set for each split, whose files are in train/ and val/.

    In options, {} stands for the split.
    """
    cfg = config(CLS)
    cfg.model = dict(head=dict(num_classes=num_classes))
    for split in ('train', 'val'):
        own = dict(type='CustomDataset', data_root=str(root), data_prefix=split)
        for key, x in options.items():
            own[key] = x.replace('{}', split) if isinstance(x, str) else x
        cfg[f'{split}_dataloader'] = dict(dataset=own)
    return cfg


def build(dataset, **options):
    with DefaultScope.overwrite_default_scope(CLS):
        return DATASETS.build(dict(dataset, **options))


def look_at(cfg, *splits):
    return check_data(cfg, *(splits or ['train']), look='names').findings


CATS = ('cat/1.jpg', 'cat/2.JPG', 'cat/sub/3.png')
DOGS = (
    'dog/1.jpeg',
    'dog/1.txt',
    'dog/Thumbs.db',
    'dog/.DS_Store',
    'dog/.hidden/2.tif',
)
LISTED = 'cat/1.jpg 0\ncat/2.JPG 0\ndog/1.jpeg 1\n'
LAYOUTS = {
    'folders': ((), {}),
    'hidden files': (('dog/._1.jpg', '.DS_Store', '._x.jpg'), {}),
    'folders of programs': (('.git/x', '@eaDir/x.jpg', 'dog/@eaDir/y.jpg'), {}),
    'folder named as an image': (('dog/y.jpg/SYNOFILE_THUMB_M.jpg',), {}),
    'other extensions': (('dog/a.webp', 'dog/b.tiff', 'cat/1.gif'), {}),
    'own extensions': (('dog/a.webp', 'b.tiff'), dict(extensions=['.webp', '.JPG'])),
    'without labels': (('1.jpg', '.hidden.jpg'), dict(with_label=False)),
    'list': ((), dict(ann_file='train.txt')),
    'classes': ((), dict(metainfo=dict(classes=['Cat', 'Dog']))),
    'first images': ((), dict(indices=5)),
    'last images': ((), dict(indices=-4)),
    'some images': ((), dict(indices=[0, 4, 3, 3])),
}  # fmt: skip


@pytest.mark.parametrize('case', LAYOUTS)
def test_images_and_labels_are_those_of_mmpretrain(tmp_path, case):
    names, options = LAYOUTS[case]
    lay_out(tmp_path / 'train', *CATS, *DOGS, *names)
    (tmp_path / 'train.txt').write_text(LISTED)
    if 'extensions' not in options:
        os.mkfifo(tmp_path / 'train/dog/pipe.jpg')
    (tmp_path / 'train/dog/link.jpg').symlink_to('nowhere')
    (tmp_path / 'train/dog/good.jpg').symlink_to('1.jpeg')
    (tmp_path / 'train/dog/linked').symlink_to('../cat')
    config = custom(tmp_path, **options).train_dataloader.dataset
    source = Source('train', '', build(config, lazy_init=True), config, None, 'names')
    findings, dataset = list(check_folders(source)), build(config)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [str(path) for path in source.images] == [x['img_path'] for x in infos]
    if 'ann_file' not in options:
        assert source.folder_labels == getattr(dataset, 'folder_to_idx', {})
    if source.counts is None:
        assert any(finding.fatal for finding in findings)
        return
    assert source.counts.images == len(dataset)
    if options.get('with_label', True):
        numbers = np.bincount(dataset.get_gt_labels(), minlength=2).tolist()
        assert source.counts.numbers == numbers
        assert source.counts.classes == tuple(dataset.CLASSES or '01')
    else:
        assert source.counts.numbers is None


GOOD = [f'{split}/{x}' for split in ('train', 'val') for x in (*CATS, *DOGS[:4])]
HARMLESS = {
    'nothing odd': ((), {}),
    'hidden files': (('train/cat/._9.jpg', 'train/.DS_Store', 'train/a.txt'), {}),
    'a folder of images in each class': (
        ('train/cat/sub/9.jpg', 'train/horse/images/1.jpg'), {}),
    'classes of other names': ((), dict(metainfo=dict(classes=['Katze', 'Hund']))),
    'underscores': ((), dict(metainfo=dict(classes=['CAT', 'Dog']))),
    'the same image in two formats': (('train/cat/1.webp', 'train/dog/1.gif'), {}),
    'masks left out': (
        ('train/cat/a.tiff', 'train/dog/a.tiff'),
        dict(extensions=['.jpg', '.jpeg', '.png'])),
    'dates in a list': (
        (), dict(ann_file='{}.txt',
                 train='a/1.jpg 0\na/2.jpg 1\nb/3.jpg 0\n',
                 val='a/9.jpg 1\nb/8.jpg 0\n')),
}  # fmt: skip


def write_lists(root, options):
    for split in ('train', 'val'):
        lines = options.pop(split, '')
        (root / f'{split}.txt').write_text(lines)
        names = [line.rpartition(' ')[0] for line in lines.splitlines()]
        lay_out(root / split, *filter(None, names))
    return options


@pytest.mark.parametrize('case', HARMLESS)
def test_harmless(tmp_path, case):
    names, options = HARMLESS[case]
    lay_out(tmp_path, *GOOD, *names)
    cfg = custom(tmp_path, **write_lists(tmp_path, dict(options)))
    assert look_at(cfg) == look_at(cfg, 'val') == []
    if 'horse' not in str(names):
        assert look_at(cfg, 'train', 'val') == []


FIVE = [f'train/{i}/{k}.jpg' for i in range(5) for k in range(4)]
DOG_FIRST = dict(classes=['dog', 'cat'])
# Files, options, number of classes, and what is said: problem and way out.
REFUSED = {
    'a class of another format': (
        [*GOOD, 'train/fox/a.webp', 'train/fox/b.jpg/'], {}, 3,
        'left out, because of their extension: fox/a.webp', "'.webp'"),
    'a fifth of another format': (
        [*FIVE, *(f'train/{i}/x.tiff' for i in range(5))], {}, 5,
        '5 images', '0/x.tiff', "'.tiff'"),
    'without labels': (
        ['train/1.jpg', 'train/2.webp'], dict(with_label=False), None,
        '1 images', '2.webp', "'.webp'"),
    'no images': (['train/cat/1.txt'], {}, None, 'No images', '.jpg', 'FOLDER/CLASS'),
    'a folder of Jupyter': (
        [*GOOD, 'train/.ipynb_checkpoints/1.jpg'], {}, 3,
        'get a label: .ipynb_checkpoints', 'Remove', 'positions'),
    'a folder of Windows': (
        [*GOOD, 'train/$RECYCLE.BIN/'], {}, None, '$RECYCLE.BIN', 'Remove'),
    'too few classes': (GOOD, {}, 3, '2 class folders', '3 classes', 'num_classes'),
    'one deeper': (
        ['train/train/cat/1.jpg', 'train/train/dog/1.jpg'], {}, 2,
        'one class folder', ': train.', "'train/train'"),
    'two deeper': (
        ['train/a/b/cat/1.jpg', 'train/a/b/dog/1.jpg', 'train/__MACOSX/._1.jpg'], {}, 2,
        'one class folder', ': a.', "'train/a/b'"),
    'too high': (
        GOOD, dict(data_prefix=''), 2, 'splits as class folders: train, val',
        "'train'"),
    'classes of another order': (
        GOOD, dict(metainfo=DOG_FIRST), 2,
        'cat has label 0, and is metainfo.classes[1]', 'Sort metainfo.classes'),
    'numbers sorted as text': (
        [f'train/{i}/1.jpg' for i in range(11)],
        dict(metainfo=dict(classes=[str(i) for i in range(11)])), 11,
        '9 class folders', '10 has label 2, and is metainfo.classes[10]'),
    'first images': (
        GOOD, dict(indices=3), 2, '1 classes of train_dataloader', 'no images: dog'),
    'a list with labels of another order than classes': (
        [], dict(ann_file='{}.txt', train=LISTED, metainfo=DOG_FIRST),
        2, 'cat has label 0, and is metainfo.classes[1]', 'Mend', 'train.txt'),
    'a list without a class': (
        [], dict(ann_file='{}.txt', train=LISTED), 3, 'have no images: 2'),
    'a list of names with an empty line': (
        [], dict(ann_file='{}.txt', with_label=False, train='a 0\n\nb 1\n'), None,
        'are empty: line 2', 'its lines are IMAGE.'),
    'a list of names with blanks at their ends': (
        ['train/1.jpg'], dict(ann_file='{}.txt', with_label=False, train='1.jpg \n'),
        None, '1 images are not in', '1.jpg'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_refused(tmp_path, case):
    names, options, num_classes, *words = REFUSED[case]
    options = write_lists(tmp_path, dict(options))
    lay_out(tmp_path, *names)
    with pytest.raises(ValueError) as caught:
        require_data(custom(tmp_path, num_classes, **options), 'train')
    assert_says(caught.value, *words)


WARNED = {
    'thumbnails': (
        [*GOOD, 'train/cat/@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg',
         'train/cat/.ipynb_checkpoints/1-checkpoint.jpg'],
        {}, '2 images', 'are used: cat/.ipynb_checkpoints/1-checkpoint.jpg'),
    'class folders in a class folder': (
        [*GOOD, 'train/animals/fox/1.jpg', 'train/animals/owl/1.jpg'],
        {}, '1 class folders', 'animals (fox, owl)', 'FOLDER/CLASS/IMAGE'),
    'images beside the class folders': (
        [*GOOD, 'train/1.jpg', 'train/2.png'], {}, '2 images', 'beside', ': 1.jpg, 2'),
    'few images of another format': (
        [*FIVE, 'train/0/x.tiff'], {}, '1 images', '0/x.tiff', "'.tiff'"),
    'a broken link': (
        [*FIVE, 'train/0/x.jpg'], {}, '1 images', '0/x.jpg cannot be opened'),
    'some classes of other names': (
        GOOD, dict(metainfo=dict(classes=['cat', 'wolf'])),
        'are not in metainfo.classes: dog'),
    'numbers sorted as text': (
        [f'train/{i}/1.jpg' for i in range(11)],
        dict(metainfo=dict(classes=list('abcdefghijk'))), '0, 1, 10', 'leading zeros'),
}  # fmt: skip


@pytest.mark.parametrize('case', WARNED)
def test_warned(tmp_path, case):
    names, options, *words = WARNED[case]
    lay_out(tmp_path, *names)
    if case == 'a broken link':
        (tmp_path / 'train/0/x.jpg').unlink()
        (tmp_path / 'train/0/x.jpg').symlink_to('nowhere')
    (finding,) = look_at(custom(tmp_path, **options))
    assert not finding.fatal
    assert_says(f'{finding.problem}. {finding.fix}', *words)


# Several data sets: files, options, whether it is fatal, and what is said.
A, B, C = 'a/1.jpg', 'b/1.jpg', 'c/1.jpg'


def in_both(train, val):
    return [*(f'train/{x}' for x in train), *(f'val/{x}' for x in val)]


DIFFERENT = {
    'another name': (in_both([A, B], [A, C]), {}, True, 'train and val: b, c', 'alike'),
    'the first is missing': (in_both([A, B], [B]), {}, True, 'only one of', ': a'),
    'the last is missing': (in_both([A, B], [A]), {}, False, 'only one of', ': b'),
    'another case': (in_both([A, B], ['A/1.jpg', B]), {}, True, 'train and val: A, a'),
    'lists of other labels': (
        [], dict(ann_file='{}.txt', train='a/1.jpg 0\nb/1.jpg 1\n',
                 val='b/1.jpg 0\na/1.jpg 1\n'),
        True, '2 class folders have two labels',
        'b is 1 in train_dataloader.dataset and 0 in val_dataloader.dataset', 'Give'),
    'lists with folders before those of classes': (
        [], dict(ann_file='{}.txt', train='x/y/a/1.jpg 0\nx/y/b/1.jpg 1\n',
                 val='z/b/1.jpg 0\nz/c/1.jpg 1\n'),
        True, 'b is 1 in train_dataloader.dataset and 0 in'),
    'flat lists': (
        [], dict(ann_file='{}.txt', train='1.jpg 0\n2.jpg 1\n',
                 val='1.jpg 1\n2.jpg 0\n'),
        None),
    'several folders of a class': (
        [], dict(ann_file='{}.txt', train='a/1.jpg 0\nb/1.jpg 0\nc/1.jpg 1\n',
                 val='a/1.jpg 1\nb/1.jpg 0\n'),
        None),
    'a list that has not all classes': (
        [], dict(ann_file='{}.txt', train='a/1.jpg 0\nb/1.jpg 1\nc/1.jpg 2\n',
                 val='c/1.jpg 2\nb/1.jpg 1\n'),
        None),
}  # fmt: skip


@pytest.mark.parametrize('case', DIFFERENT)
def test_train_and_val(tmp_path, case):
    names, options, fatal, *words = DIFFERENT[case]
    lay_out(tmp_path, *names)
    cfg = custom(tmp_path, **write_lists(tmp_path, dict(options)))
    found = [
        x for x in look_at(cfg, 'train', 'val') if 'have no images' not in x.problem
    ]
    assert [finding.fatal for finding in found] == ([] if fatal is None else [fatal])
    assert_says(found, *words)
    if fatal:
        label = [build(cfg[f'{x}_dataloader'].dataset) for x in ('train', 'val')]
        labels = [
            {
                (info['img_path'].split('/')[-2], info['gt_label'])
                for info in map(dataset.get_data_info, range(len(dataset)))
            }
            for dataset in label
        ]
        # A folder with two labels, or a label with two folders
        pairs = set.union(*labels)
        assert len(pairs) > min(len({x[i] for x in pairs}) for i in (0, 1))


def test_a_list_and_class_folders(tmp_path):
    lay_out(tmp_path, *GOOD)
    (tmp_path / 'val.txt').write_text('dog/1.jpeg 0\ncat/1.jpg 1\n')
    cfg = custom(tmp_path)
    cfg.val_dataloader.dataset.ann_file = 'val.txt'
    (finding,) = look_at(cfg, 'train', 'val')
    assert_says(finding.problem, 'cat is 0 in train_dataloader.dataset and 1 in val_')
    with pytest.raises(ValueError, match='two labels'):
        require_data(cfg, 'train', 'val')


def test_several_data_sets_of_a_split(tmp_path):
    lay_out(tmp_path, *GOOD, 'more/cat/1.jpg', 'more/cow/1.jpg', 'more/dog/1.jpg')
    cfg = custom(tmp_path)
    dataset = cfg.train_dataloader.dataset
    parts = [dataset, dict(dataset, data_prefix='more')]
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
    (finding,) = look_at(cfg, 'train', 'val')
    where = 'train_dataloader.dataset.datasets'
    assert_says(finding.problem, f'only one of {where}.0 and {where}.1: cow')
    assert finding.fatal
