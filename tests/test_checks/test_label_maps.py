# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images and label maps: the file, what is wrong, and the way out."""

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from PIL import Image

from mlla_mm.checks import label_maps
from mlla_mm.checks.data import check_data, require_data
from mlla_mm.checks.label_maps import likely_cause
from mlla_mm.checks.source import FILES, NAMES, PIXELS

from .. import bad_data
from ..bad_data import (
    HEIGHT,
    PREFIX,
    SEG,
    WIDTH,
    assert_refused,
    assert_says,
    config,
    empty,
    noise,
    rename,
    save,
    truncate,
    turn,
)

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


def labels(*shape, value=1, dtype=np.uint8):
    return lambda root: save(root / 'maps/1.png', np.full(shape, value, dtype))


def map_file(spoil):
    return lambda root: spoil(root / 'maps/1.png')


def repeated(values, dtype=np.uint8):
    """A label map in which some values alternate."""
    return np.resize(np.array(values, dtype), (HEIGHT, WIDTH))


def fill(*values, dtype=np.uint8):
    def spoil(root):
        for i in range(3):
            kind = 'TIFF' if dtype is np.int32 else 'PNG'
            save(root / f'maps/{i}.png', repeated(values, dtype), format=kind)

    return spoil


def colours(root):
    for i in range(3):
        save(root / f'maps/{i}.png', noise(HEIGHT, WIDTH, 3) // 100)


def jpeg(root):
    for i in range(3):
        path = root / f'maps/{i}.png'
        save(path, np.array(Image.open(path)), format='JPEG')


def palette(root):
    """Files of indices; as OpenCV reads them, they have colours."""
    for i in range(3):
        path = root / f'maps/{i}.png'
        indices = Image.open(path)
        indices.putpalette(list(noise(256, 3).ravel()))
        indices.save(path)


def half_size(root):
    for i in range(3):
        save(root / f'maps/{i}.png', repeated(range(12))[::2, : WIDTH // 2])


def seg_config(root, classes=None, **dataset):
    """The nano config, for two classes or others, with options of the data sets."""
    cfg = config(SEG, root)
    for split in ('train', 'val'):
        part = cfg[f'{split}_dataloader'].dataset
        part.update(dataset)
        if classes is not None:
            part.metainfo = dict(classes=classes)
    return cfg


def found_in(cfg, look=PIXELS, split='train'):
    return check_data(cfg, split, look=look).findings


# Files.

SUFFIX = 'seg_map_suffix of train_dataloader'
IMG_SUFFIX = 'img_suffix of train_dataloader'


def to_png(number):
    return rename(f'images/{number}.jpg', f'images/{number}.png')


MASK_ERRORS = {
    'no image folder': (rename('images', 'pictures'), 'images', 'not found', PREFIX),
    'no folder of label maps': (rename('maps', 'masks'),
                                'maps', 'not found', 'data_prefix', SUFFIX),
    'other suffix': (
        lambda root: [x.rename(x.with_suffix('.JPG')) for x in root.glob('images/*')],
        'images, but 3 *.JPG', '*.jpg', IMG_SUFFIX),
    'mixed suffixes': (to_png(1), 'images', '1 images', 'do not end in .jpg',
                       'have a label map: 1.png', IMG_SUFFIX),
    'mixed case': (rename('images/1.jpg', 'images/1.JPG'), 'images',
                   'have a label map: 1.JPG', IMG_SUFFIX),
    'no label map': (lambda root: (root / 'maps/2.png').unlink(),
                     'maps: 2.png', 'data_prefix', SUFFIX),
}  # fmt: skip


@pytest.mark.parametrize('case', MASK_ERRORS)
def test_folders_of_label_maps(masks, case):
    spoil, *words = MASK_ERRORS[case]
    spoil(masks)
    assert_refused(SEG, masks, *words)


def test_a_list_of_images(masks):
    """It may name some of the images, and those of other suffixes are not its own."""
    path, cfg = masks / 'train.txt', seg_config(masks, ann_file='train.txt')
    to_png(1)(masks)
    for content, *words in (
        (None, 'Annotation file not found', 'ann_file of train_dataloader'),
        ('', 'is empty', 'names of images'),
        ('0\n7\n', f'label maps are not in {masks}/maps: 7.png', 'seg_map_suffix'),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError) as caught:
            require_data(cfg, 'train')
        assert_says(caught.value, *words)
    path.write_text('0\n2\n')
    report = require_data(cfg, 'train')
    assert report.findings == [] and report.counts['train'].images == 2


def test_what_mmseg_leaves_out_in_silence(masks):
    to_png(1)(masks)
    with DefaultScope.overwrite_default_scope(SEG):
        assert len(DATASETS.build(config(SEG, masks).train_dataloader.dataset)) == 2


def test_a_data_set_for_each_suffix(masks, monkeypatch):
    to_png(1)(masks)
    cfg = config(SEG, masks)
    monkeypatch.chdir(masks)
    parts = [
        dict(
            cfg.train_dataloader.dataset,
            img_suffix=suffix,
            data_root='.',
            data_prefix=dict(img_path='images', seg_map_path=str(masks / 'maps')),
        )
        for suffix in ('.jpg', '.png')
    ]
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
    report = check_data(cfg, 'train')
    assert report.findings == []
    assert report.counts['train'].images == 3
    to_tif = rename('images/2.jpg', 'images/2.tif')
    to_tif(masks)
    first, second = found_in(cfg, NAMES)
    assert_says(first.problem, 'have a label map: 2.tif')


@pytest.mark.parametrize('look', [NAMES, FILES, PIXELS])
def test_other_files(masks, look):
    for name in ('images/.hidden.png', 'images/1.json', 'images/1.png', 'maps/.4.png'):
        bad_data.empty(masks / name)
    assert [x.problem for x in found_in(config(SEG, masks), look) if x.fatal] == []
    (finding,) = found_in(config(SEG, masks), look)
    assert_says(finding.problem, f'1 images in {masks}/images', 'left out: 1.png')
    (masks / 'images/1.png').unlink()
    bad_data.empty(masks / 'maps/7.png')
    (finding,) = found_in(config(SEG, masks), look)
    assert_says(finding.problem, 'label maps', f'no image in {masks}/images: 7.png')
    assert not finding.fatal


def test_one_folder_for_images_and_label_maps(masks):
    for path in (*masks.glob('images/*'), *masks.glob('maps/*')):
        path.rename(masks / path.name)
    cfg = seg_config(masks, data_prefix=dict(img_path='', seg_map_path=''))
    empty(masks / '0_picture.png')
    assert [x.problem for x in found_in(cfg) if x.fatal] == []
    (masks / '1.jpg').rename(masks / '1.jpeg')
    (found,) = [x.problem for x in found_in(cfg) if x.fatal]
    assert_says(found, 'have a label map: 1.jpeg')


def test_files_of_cityscapes(tmp_path):
    """Each image has several files, and labels are from 0 to 18, or 255."""
    for city in 'ab':
        stem = f'gtFine/{city}/{city}_0_gtFine'
        image = tmp_path / f'leftImg8bit/{city}/{city}_0_leftImg8bit.png'
        save(image, noise(HEIGHT, WIDTH, 3))
        save(tmp_path / f'{stem}_labelTrainIds.png', repeated([*range(19), 255]))
        save(tmp_path / f'{stem}_labelIds.png', repeated(range(34)))
        save(tmp_path / f'{stem}_color.png', noise(HEIGHT, WIDTH, 3))
        empty(tmp_path / f'{stem}_polygons.json')
    cfg = config(SEG, tmp_path)
    cfg.train_dataloader.dataset = dict(
        type='CityscapesDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='leftImg8bit', seg_map_path='gtFine'),
        pipeline=cfg.train_dataloader.dataset.pipeline,
    )
    for look in (NAMES, FILES, PIXELS):
        assert found_in(cfg, look) == []
    # An image of another type belongs to the label map of its name.
    image.rename(image.with_suffix('.jpg'))
    (finding,) = found_in(cfg, NAMES)
    assert_says(finding.problem, 'have a label map: b/b_0_leftImg8bit.jpg')


# Each label map.

OTHER_SIZE = 'another size than their label map'
MASK_FINDINGS = {
    'other size': (labels(HEIGHT, WIDTH - 1), OTHER_SIZE),
    'transposed': (labels(WIDTH, HEIGHT), OTHER_SIZE),
    # Only the image is turned.
    'turned': (lambda root: turn(6)(root / 'images/1.jpg'), OTHER_SIZE),
    'colours': (labels(HEIGHT, WIDTH, 3), 'not of one channel'),
    '16 bit': (labels(HEIGHT, WIDTH, value=300, dtype=np.uint16), 'fit into 8 bits'),
    'empty': (labels(HEIGHT, WIDTH, value=0), 'no labelled pixel: 1.jpg'),
    'truncated': (
        map_file(truncate),
        'label map that cannot be read: ../maps/1.png is truncated',
    ),
    'zero bytes': (map_file(empty), 'label map that cannot be read: ../maps/1.png is '),
    'bomb': (
        map_file(bad_data.bomb),
        'label map that cannot be read: ../maps/1.png is of 1080000000 pixels',
    ),
    'pipe': (
        map_file(bad_data.pipe),
        'label map that cannot be read: ../maps/1.png is ',
    ),
    'link to nothing': (
        map_file(bad_data.link_to_nothing),
        'label map that cannot be read: ../maps/1.png cannot',
    ),
    'PostScript': (
        map_file(bad_data.postscript),
        'label map that cannot be read: ../maps/1.png is ',
    ),
}


@pytest.mark.parametrize('case', MASK_FINDINGS)
@pytest.mark.usefixtures('no_waiting')
def test_label_maps(masks, case):
    spoil, problem = MASK_FINDINGS[case]
    spoil(masks)
    (finding,) = found_in(config(SEG, masks))
    assert_says(finding.problem, problem, f'1 images in {masks}/images')
    assert finding.fatal == (case != 'empty')


@pytest.mark.usefixtures('no_waiting')
def test_training_may_skip_label_maps(masks):
    """A few that cannot be read are no reason to refuse it."""
    for spoil in (truncate, bad_data.pipe, bad_data.link_to_nothing):
        spoil(masks / 'maps/1.png')
        require_data(config(SEG, masks), 'train')
    for i in range(3):
        empty(masks / f'maps/{i}.png') if i != 1 else None
    assert_refused(SEG, masks, 'images', '3 of the 3 images', 'cannot be read')


def test_labels_that_are_classes(masks):
    """11 classes: 0 to 10, or 1 to 11 if 0 is unlabelled; 255 always is."""
    labels(HEIGHT, WIDTH, value=255)(masks)
    save(masks / 'maps/2.png', np.full((HEIGHT, WIDTH), 11, np.uint8))
    above, unlabelled = found_in(seg_config(masks, reduce_zero_label=False))
    assert_says(above.problem, f'2 of the 3 label maps looked into in {masks}/maps')
    assert_says(above.problem, 'labels above 10 (11 in 2600 pixels): 0.png, 2.png')
    assert_says(above.fix, 'reduce_zero_label=True')
    assert_says(unlabelled.problem, 'no labelled pixel: 1.jpg')


# All label maps.

# Each with the classes, reduce_zero_label, and what is said.
BINARY = ('ground', 'car')
SYSTEMATIC = {
    '0 and 255': (fill(0, 255), BINARY, False, 'Only label 0', 'Write 0 and 1.'),
    '0 and 255, reduced': (fill(0, 255), BINARY, True, 'No label', 'Write 0 and 1 and'),
    '0 and 255, one class': (fill(0, 255), ['car'], False, 'Only', 'Write 0 and 1.'),
    '0 and 128': (fill(0, 128), BINARY, False, '(128 in 3600 pix', 'Write 0 and 1.'),
    '0 and 1, reduced': (fill(0, 1), BINARY, True, 'Only label 0', 'label=False'),
    '0 and 1, one class': (fill(0, 1), ['car'], True, 'Only label 0', 'label=False'),
    'one label': (fill(1), BINARY, False, 'Only label 1 is in the 3', 'numbers of'),
    'from 1': (fill(1, 2), BINARY, False, 'above 1', 'reduce_zero_label=True', 'subtr'),
    'one more': (fill(0, 1, 2), BINARY, False, 'above 1', 'label=True', 'one class mo'),
    'from 0, reduced': (fill(*range(11)), None, True, 'No pixel of class 9', '=False'),
    'unlabelled': (fill(255), None, True, 'No label', 'reduce_zero_label'),
    'shades': (fill(0, 127, 255), 'abc', False, 'above 2', 'shades', 'from 0 to 2'),
    'many values': (fill(*range(240)), 'ab', False, 'above 1 (2 in 30', 'JPEG', 'PNG'),
    'JPEG': (jpeg, None, True, '3 of the 3 images', 'is a JPEG file', 'PNG'),
    'colours': (colours, None, True, 'one channel (mode RGB)', 'each colour'),
    '16 bit': (fill(0, 300, dtype=np.uint16), None, True, '8 bits', 'PNG'),
    'half': (half_size, None, True, OTHER_SIZE, 'of the size of its image'),
}


@pytest.mark.parametrize('case', SYSTEMATIC)
def test_systematic_mistakes(masks, case):
    """They are found when a training starts, and there is one finding each."""
    spoil, classes, reduced, *words = SYSTEMATIC[case]
    spoil(masks)
    cfg = seg_config(masks, classes and [*classes], reduce_zero_label=reduced)
    with pytest.raises(ValueError) as caught:
        require_data(cfg, 'train')
    assert_says(caught.value, *words)
    for look in (NAMES, FILES, PIXELS):
        (finding,) = (x for x in found_in(cfg, look) if x.fatal)
        assert finding.fatal


def loaded(cfg, split='train'):
    """The label maps as mmseg loads them."""
    with DefaultScope.overwrite_default_scope(SEG):
        dataset = DATASETS.build(dict(cfg[f'{split}_dataloader'].dataset, pipeline=[]))
        steps = cfg[f'{split}_dataloader'].dataset.pipeline
        (step,) = (x for x in steps if x.type == 'LoadAnnotations')
        load = TRANSFORMS.build(step)
    return [load(dataset[i])['gt_seg_map'] for i in range(len(dataset))]


FROM_0 = dict(reduce_zero_label=False)
COUNTS = {
    'reduced': (lambda root: None, {}),
    'from 0': (fill(*range(11), 255), FROM_0),
    'palette': (palette, {}),
    '1 bit': (fill(False, True, dtype=bool), dict(FROM_0, classes=BINARY)),
    '16 bit': (fill(0, 1, dtype=np.uint16), dict(FROM_0, classes=BINARY)),
    '32 bit': (fill(0, 1, 1, dtype=np.int32), dict(FROM_0, classes=BINARY)),
    'some of ADE20K': (
        fill(*range(151)),
        dict(type='ADE20KDataset', classes=('sky', 'wall', 'flag')),
    ),
    'some of Cityscapes': (
        fill(*range(19), 255),
        dict(
            FROM_0,
            type='CityscapesDataset',
            classes=('car', 'road'),
            seg_map_suffix='.png',
        ),
    ),
    'two of three': (lambda root: None, dict(indices=[0, 2])),
}


@pytest.mark.parametrize('case', COUNTS)
def test_counts_are_those_of_mmseg(masks, case):
    spoil, options = COUNTS[case]
    spoil(masks)
    cfg = seg_config(masks, **options)
    report = check_data(cfg, 'train')
    assert report.findings == []
    counts, maps = report.counts['train'], loaded(cfg)
    num_classes = len(counts.classes)
    numbers = np.array([np.bincount(x.ravel(), minlength=256) for x in maps])
    assert numbers[:, num_classes:255].sum() == 0
    assert counts.numbers == numbers.sum(0)[:num_classes].tolist()
    assert counts.images_with == (numbers > 0).sum(0)[:num_classes].tolist()
    assert (counts.images, counts.unit) == (len(maps), 'pixels')
    # A look at a few label maps counts nothing.
    counts = check_data(cfg, 'train', look=NAMES).counts['train']
    assert (counts.images, counts.numbers) == (len(maps), None)


def test_classes_that_never_occur(masks):
    fill(1, 2, 4)(masks)
    for split in ('train', 'val'):
        (finding,) = found_in(config(SEG, masks), split=split)
        assert_says(finding.problem, 'have no pixels: 1, 3, 4 and 5 more')
        assert finding.fatal == (split == 'train')
    require_data(config(SEG, masks), 'train', 'val')  # it looks into a few


def test_few_labels_of_a_validation(masks):
    fill(0, 255)(masks)
    cfg = seg_config(masks, [*'abc'], reduce_zero_label=False)
    assert found_in(cfg, NAMES, 'val') == []
    with pytest.raises(ValueError, match='Only label 0'):
        require_data(cfg, 'train')


def test_classes_that_may_lack(masks):
    """The last class may be rare. The user says so, or it is the validation."""
    fill(*range(11))(masks)
    cfg = config(SEG, masks)
    assert not any(x.fatal for x in found_in(cfg, split='val'))
    cfg.allow_empty_classes = True
    assert not any(x.fatal for x in found_in(cfg))


def test_a_second_class_is_looked_for(masks, monkeypatch):
    decode = label_maps._decode
    for i in range(3, 70):
        for name in (f'images/{i}.jpg', f'maps/{i}.png'):
            (masks / name).symlink_to(masks / name.replace(f'{i}.', '0.'))
    fill(0)(masks)
    cfg = seg_config(masks, BINARY, reduce_zero_label=False)
    (finding,) = found_in(cfg, NAMES)
    assert_says(finding.problem, 'Only label 0 is in the 70 label maps looked into')
    assert found_in(cfg, NAMES, 'val') == []
    (masks / 'maps/66.png').unlink()
    save(masks / 'maps/66.png', repeated([0, 1]))
    assert found_in(cfg, NAMES) == []
    # The last class may be rare, unless all label maps were looked into.
    fill(*range(11))(masks)
    whole = config(SEG, masks)
    assert not any(x.fatal for x in found_in(whole, NAMES))
    assert any(x.fatal for x in found_in(whole))
    # Of two data sets, one may have no object.
    half = cfg.train_dataloader.dataset
    fill(0)(masks)
    (masks / 'maps/66.png').unlink()
    (masks / 'images/66.jpg').unlink()
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[half, half])
    assert found_in(cfg, NAMES) == []
    # Then nothing would be refused: the other label maps are not read.
    read = []
    monkeypatch.setattr(label_maps, '_decode', lambda *x: read.append(x) or decode(*x))
    assert found_in(cfg, NAMES) == []
    assert len(read) == 2 * 32


# What is no mistake.


def heads(cfg, **options):
    for key in ('decode_head', 'auxiliary_head'):
        cfg.model[key].update(options)


def test_one_sigmoid_channel(masks):
    fill(0, 1, 1)(masks)
    for classes in (BINARY, ['car']):
        cfg = seg_config(masks, classes, reduce_zero_label=False)
        heads(cfg, num_classes=len(classes), out_channels=1)
        assert found_in(cfg) == found_in(cfg, NAMES) == []
        counts = check_data(cfg, 'train').counts['train']
        assert counts.numbers == [HEIGHT * WIDTH, 2 * HEIGHT * WIDTH][-len(classes) :]
        assert counts.images_with == [3] * len(classes)
    # mmseg's loss wants labels of 0 and 1, also for one class.
    from mmseg.models.losses import binary_cross_entropy

    binary_cross_entropy(torch.zeros(1, 1, 2, 1), torch.tensor([[[0], [1]]]))


def test_one_class_of_a_head_that_predicts_masks(masks):
    """Mask2Former learns it from its masks: all else is no object."""
    fill(0, 1)(masks)
    cfg = seg_config(masks, ['car'], reduce_zero_label=True)
    cfg.model.decode_head.num_queries = 100
    assert found_in(cfg) == found_in(cfg, NAMES) == []


def test_an_ignored_label_of_the_heads(masks):
    fill(*range(12))(masks)
    cfg = seg_config(masks, reduce_zero_label=False)
    assert any(x.fatal for x in found_in(cfg))
    heads(cfg, ignore_index=11)
    assert found_in(cfg) == []


def test_classes_of_the_heads(masks):
    """They count if the data set names no classes."""
    cfg = seg_config(masks)
    cfg.train_dataloader.dataset.metainfo = {}
    heads(cfg, num_classes=10)
    (finding,) = found_in(cfg, NAMES)
    assert_says(finding.problem, 'above 10 (11 in 600 pixels)')


def test_palettes_with_opencv(masks):
    palette(masks)
    cfg = config(SEG, masks)
    cfg.train_dataloader.dataset.pipeline[1].imdecode_backend = 'cv2'
    assert loaded(cfg)[0].ndim == 3
    with pytest.raises(ValueError) as caught:
        require_data(cfg, 'train')
    assert_says(caught.value, 'palette', 'imdecode_backend')


def test_transforms_of_others(masks):
    """They may change labels, so these are no reason to refuse a training."""

    class Binarize:
        _load_seg_map = None

    fill(0, 255)(masks)
    cfg = seg_config(masks, BINARY, reduce_zero_label=False)
    steps = cfg.train_dataloader.dataset.pipeline
    steps.insert(2, dict(type=Binarize))
    (finding,) = found_in(cfg, NAMES)
    assert_says(finding.fix, 'Write 0 and 1')
    assert not finding.fatal
    # Nothing is known of the values if another transform reads the files.
    del steps[1]
    assert found_in(cfg) == []


def test_sizes_that_become_one(masks):
    half_size(masks)
    cfg = config(SEG, masks)
    steps = cfg.train_dataloader.dataset.pipeline
    steps[2].keep_ratio = False
    assert found_in(cfg) == []
    with DefaultScope.overwrite_default_scope(SEG):
        sample = DATASETS.build(cfg.train_dataloader.dataset)[0]
    assert sample['data_samples'].gt_sem_seg.shape == sample['inputs'].shape[1:]
    turn(6)(masks / 'images/1.jpg')
    (finding,) = found_in(cfg, NAMES)
    assert_says(finding.problem, OTHER_SIZE, '1.jpg')


def test_the_score_of_binary_pictures(masks):
    """Without the check: no pixel of the second class is measured."""
    from mmseg.evaluation import IoUMetric

    fill(0, 255)(masks)
    truth = torch.tensor(loaded(seg_config(masks, BINARY, reduce_zero_label=False))[0])
    areas = IoUMetric.intersect_and_union(torch.zeros_like(truth), truth, 2, 255)
    assert areas[3].tolist() == [HEIGHT * WIDTH / 2, 0]


# Other ways to name and to read files.


def test_lists_of_names_with_suffixes(masks):
    (masks / 'train.txt').write_text('0.jpg\n1.jpg\n')
    cfg = seg_config(masks, ann_file='train.txt')
    maps, images = found_in(cfg, NAMES)
    assert_says(maps.problem, 'not in', '0.jpg.png')
    assert_says(maps.fix, f'Lines of {masks}/train.txt', 'without .jpg')
    assert_says(images.fix, f'read from {masks}/train.txt')


def test_no_folder_of_label_maps_is_named(masks):
    cfg = seg_config(masks)
    del cfg.train_dataloader.dataset.data_prefix.seg_map_path
    (finding,) = found_in(cfg, NAMES)
    assert_says(finding.problem, 'no seg_map_path', 'LoadAnnotations')
    with pytest.raises(KeyError, match='seg_map_path'):  # without the check
        loaded(cfg)
    del cfg.train_dataloader.dataset.pipeline[1]
    assert found_in(cfg) == []


@pytest.mark.parametrize('indices', [0, [], [0, 7]])
def test_indices_without_images(masks, indices):
    (finding,) = found_in(seg_config(masks, indices=indices), NAMES)
    assert_says(finding.problem, 'indices of train_dataloader.dataset', '3 images')


def test_an_ignored_label_of_the_data_set(masks):
    """mmseg does not use it."""
    fill(*range(12))(masks)
    cfg = seg_config(masks, ignore_index=11, reduce_zero_label=False)
    (finding,) = found_in(cfg, NAMES)
    assert_says(finding.problem, 'above 10')


def test_data_sets_that_assert(masks):
    """mmseg says nothing but AssertionError."""
    cfg = seg_config(masks)
    for kind in ('DRIVEDataset', 'PascalVOCDataset'):
        cfg.train_dataloader.dataset = dict(
            type=kind,
            data_root=str(masks),
            data_prefix=dict(img_path='pictures', seg_map_path='maps'),
            ann_file='',
        )
        with pytest.raises(ValueError) as caught:
            require_data(cfg, 'train')
        assert_says(caught.value, kind, f'not found: {masks}/pictures', 'data_prefix')


def test_arrays_of_numpy(masks):
    for path in masks.glob('images/*'):
        np.save(path.with_suffix('.npy'), noise(HEIGHT, WIDTH, 25))
        path.unlink()
    cfg = seg_config(masks, img_suffix='.npy')
    cfg.train_dataloader.dataset.pipeline[0] = dict(type='LoadImageFromNpyFile')
    assert found_in(cfg) == []


def test_tiff_files_of_five_channels(masks):
    """Pillow does not know them."""
    tifffile = pytest.importorskip('tifffile')
    for path in masks.glob('images/*'):
        tifffile.imwrite(
            path.with_suffix('.tif'),
            noise(HEIGHT, WIDTH, 5),
            planarconfig='contig',
            photometric='minisblack',
        )
        path.unlink()
    cfg = seg_config(masks, img_suffix='.tif')
    assert any(x.fatal for x in found_in(cfg))
    load = cfg.train_dataloader.dataset.pipeline[0]
    load.update(imdecode_backend='tifffile', color_type='unchanged')
    assert found_in(cfg) == []


def test_links_in_a_circle(masks):
    (masks / 'images/self.jpg').symlink_to('self.jpg')
    assert_refused(SEG, masks, 'images/self.jpg', 'cannot be read (Too many levels')


CAUSES = [
    ([0, 255], 2, False, 'Write 0 and 1.'),
    ([0, 255], 2, True, 'set reduce_zero_label=False.'),
    ([0, 254], 2, False, 'Write 0 and 1.'),
    ([0, 255], 3, False, None),
    ([0, 1, 255], 2, False, None),
    ([0, 1], 2, False, None),
    ([0, 1], 2, True, 'reduce_zero_label=False'),
    ([1, 2], 2, True, None),
    ([0, 1, 2], 2, True, None),
    ([0, 1, 2, 255], 2, True, None),
    ([1, 2], 2, False, 'from 1 to 2: set reduce_zero_label=True'),
    ([0, 1, 2], 2, False, 'from 0 to 2: set reduce_zero_label=True'),
    ([*range(1, 12)], 11, False, 'from 1 to 11'),
    ([3, 11, 255], 11, False, 'from 3 to 11'),
    ([*range(11)], 11, False, None),
    ([*range(11)], 11, True, 'from 0 to 10'),
    ([0, 1, 3], 11, True, None),
    ([*range(151)], 150, True, None),
    ([*range(150)], 150, True, 'from 0 to 149'),
    ([*range(151)], 150, False, 'from 0 to 150'),
    ([*range(19), 255], 19, False, None),
    ([*range(34)], 19, False, None),
    ([0, 85, 170, 255], 4, False, 'shades of grey'),
    ([0, 17, 34], 3, False, 'from 0 to 2'),
    ([0, 64, 128, 192], 4, True, 'from 1 to 4'),
    ([*range(250)], 2, False, '250 values: JPEG'),
    ([255], 2, False, None),
    ([], 2, False, None),
]


@pytest.mark.parametrize('values, num_classes, reduced, words', CAUSES)
def test_likely_causes(values, num_classes, reduced, words):
    histogram = np.zeros(256, np.int64)
    histogram[values] = 7
    cause = likely_cause(histogram, num_classes, reduced)
    assert cause is None if words is None else words in str(cause)
