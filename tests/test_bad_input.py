# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Bad input, and the one line that it gets."""

import json
import re
import runpy
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from mlla_mm.datasets.check_config import check_split, require_data
from mlla_mm.engine import config as options
from mlla_mm.engine import launch
from mlla_mm.engine.config_check import check_config, require_work_dir
from mlla_mm.engine.corrupt_images import CorruptImageError, check_images
from mlla_mm.engine.loops import use_seeded_loop
from mlla_mm.engine.seeding import SAMPLE, Draw, SeededDataset
from mlla_mm.models.checkpoint_layout import check_fit, find_weights
from mlla_mm.utils.checkpoint_file import load_checkpoint_file

from . import reference
from .nano import CONFIGS, NANO, build
from .processes import ROOT

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

DET, SEG, CLS = 'mmdet', 'mmseg', 'mmpretrain'
WIDTH, HEIGHT = 60, 40


def noise(*shape):
    return np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)


def save(path, pixels, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **kwargs)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def config(scope, root=None, suffix='.jpg'):
    """The nano config of a task, on the data of the fixtures below."""
    cfg = Config.fromfile(NANO[scope])
    if root is None:
        return cfg
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.data_root = str(root)
        if scope == DET:
            dataset.ann_file = 'coco.json'
            dataset.data_prefix = dict(img='images')
        elif scope == SEG:
            dataset.data_prefix = dict(img_path='images', seg_map_path='maps')
            dataset.img_suffix = suffix
    return cfg


# Configs.

CONFIG_ERRORS = [
    # Unknown types, with the nearest right name.
    (DET, {'model.type': 'MaskRCN'},
     "model.type is 'MaskRCN', which is not registered: is 'MaskRCNN' meant?"),
    (DET, {'model.backbone.type': 'MLA'},
     "model.backbone.type is 'MLA', which is not registered: is 'MLLA' meant?"),
    (DET, {'model.backbone.type': 'Wombat9'},
     "model.backbone.type is 'Wombat9', which is not registered in mmdet. Name the "
     'module that registers it in custom_imports.'),
    (SEG, {'model.decode_head.loss_decode.type': 'CrossEntropyLos'},
     "model.decode_head.loss_decode.type is 'CrossEntropyLos', which is not "
     "registered: is 'CrossEntropyLoss' meant?"),
    (DET, {'model.train_cfg.rpn.assigner.type': 'MaxIOUAssigner'},
     "model.train_cfg.rpn.assigner.type is 'MaxIOUAssigner', which is not registered: "
     "is 'MaxIoUAssigner' meant?"),
    (DET, {'train_dataloader.dataset.type': 'COCODataset'},
     "train_dataloader.dataset.type is 'COCODataset', which is not registered: is "
     "'CocoDataset' meant?"),
    (DET, {'train_dataloader.dataset.pipeline.1.type': 'LoadAnotations'},
     "train_dataloader.dataset.pipeline[1].type is 'LoadAnotations', which is not "
     "registered: is 'LoadAnnotations' meant?"),
    (CLS, {'train_dataloader.sampler.type': 'DefaultSampeler'},
     "train_dataloader.sampler.type is 'DefaultSampeler', which is not registered: is "
     "'DefaultSampler' meant?"),
    (CLS, {'optim_wrapper.optimizer.type': 'AdamWW'},
     "optim_wrapper.optimizer.type is 'AdamWW', which is not registered: is 'AdamW' "
     'meant?'),
    (SEG, {'param_scheduler.1.type': 'PolyLr'},
     "param_scheduler[1].type is 'PolyLr', which is not registered: is 'PolyLR' "
     'meant?'),
    (DET, {'default_hooks.checkpoint.type': 'WholeCheckpointHok'},
     "default_hooks.checkpoint.type is 'WholeCheckpointHok', which is not registered: "
     "is 'WholeCheckpointHook' meant?"),
    (DET, {'val_evaluator.type': 'COCOMetric'},
     "val_evaluator.type is 'COCOMetric', which is not registered: is 'CocoMetric' "
     'meant?'),
    # Numbers of classes.
    (DET, {'model.roi_head.bbox_head.num_classes': 80},
     'model.roi_head.bbox_head.num_classes is 80, but the data set of '
     'train_dataloader has 10 classes (0, 1, 2, ...): set the one or its '
     'metainfo.classes right.'),
    (DET, {'model.roi_head.mask_head.num_classes': 11},
     'model.roi_head.mask_head.num_classes is 11, but the data set of '
     'train_dataloader has 10 classes (0, 1, 2, ...): set the one or its '
     'metainfo.classes right.'),
    (SEG, {'model.auxiliary_head.num_classes': 150},
     'model.auxiliary_head.num_classes is 150, but the data set of train_dataloader '
     'has 11 classes (background, 0, 1, ...): set the one or its metainfo.classes '
     'right.'),
    (CLS, {'model.data_preprocessor.num_classes': 1000},
     'model.data_preprocessor.num_classes is 1000, but the data set of '
     'train_dataloader has 10 classes (0, 1, 2, ...): set the one or its '
     'metainfo.classes right.'),
    (SEG, {'val_dataloader.dataset.metainfo': dict(classes=('ground', 'digit'))},
     'model.decode_head.num_classes is 11, but the data set of val_dataloader has 2 '
     'classes (ground, digit): set the one or its metainfo.classes right.'),
    # Channels and outputs.
    (DET, {'model.neck.in_channels': [96, 192, 384, 768]},
     'model.neck.in_channels is [96, 192, 384, 768], but what comes in has [32, 64, '
     '128, 256] channels (MLLA of embed_dims 32, out_indices (0, 1, 2, 3)).'),
    (DET, {'model.backbone.out_indices': (1, 2, 3)},
     'model.neck.in_channels is [32, 64, 128, 256], but what comes in has [64, 128, '
     '256] channels (MLLA of embed_dims 32, out_indices (1, 2, 3)).'),
    (DET, {'model.rpn_head.in_channels': 256},
     'model.rpn_head.in_channels is 256, but what comes in has 64 channels (FPN\'s '
     'out_channels).'),
    (SEG, {'model.decode_head.in_channels': [64, 128, 256, 512]},
     'model.decode_head.in_channels is [64, 128, 256, 512], but what comes in has '
     '[32, 64, 128, 256] channels (MLLA of embed_dims 32, out_indices (0, 1, 2, 3)).'),
    (SEG, {'model.backbone.out_indices': (0, 1), 'model.decode_head.in_index': [0, 2]},
     'model.decode_head.in_index is [0, 2], but the backbone gives 2 maps (MLLA of '
     'embed_dims 32, out_indices (0, 1)).'),
    (CLS, {'model.backbone.out_indices': (2,)},
     'model.head.in_channels is 256, but what comes in has 128 channels (MLLA of '
     'embed_dims 32, out_indices (2,)).'),
    # Arguments of the backbone.
    (DET, {'model.backbone.out_indices': (1, 2, 3, 4)},
     'model.backbone: out_indices must lie between 0 and 3, or -4 and -1, got (1, 2, '
     '3, 4).'),
    (DET, {'model.backbone.drop_path': 0.1},
     "model.backbone.drop_path is not an argument of MLLA: is 'drop_path_rate' meant?"),
    (DET, {'model.backbone.drop_path_rate': -0.1},
     'model.backbone: drop_path_rate must be a number of at least 0 and below '
     '1, got -0.1.'),
    (DET, {'model.backbone.arch.num_heads': (3, 2, 4, 8)},
     'model.backbone: num_heads[0] = 3 does not divide the 32 channels of stage 0.'),
]  # fmt: skip


@pytest.mark.parametrize(
    'scope, change, message', CONFIG_ERRORS, ids=[str(x[1]) for x in CONFIG_ERRORS]
)
def test_configs(scope, change, message):
    cfg = config(scope)
    cfg.merge_from_dict(change)
    with pytest.raises(ValueError) as caught:
        check_config(cfg)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    'path',
    [path for path in sorted(CONFIGS.glob('*/*.py')) if path.parent.name != '_base_'],
    ids=lambda path: path.stem,
)
def test_our_configs_are_right(path):
    check_config(Config.fromfile(path))


def test_what_is_not_known_is_left_alone():
    cfg = config(DET)
    cfg.merge_from_dict(
        {
            'model.backbone': dict(
                _delete_=True, type='ResNet', depth=50, anything='goes'
            ),
            'train_dataloader.dataset.pipeline.2': dict(
                type='Albu', transforms=[dict(type='RandomCrops')]
            ),
            'model.test_cfg.rcnn.nms.type': 'soft_nms',
            'model.mine': dict(type='SomethingOfMine'),
        }
    )
    check_config(cfg)


def test_a_classifier_can_be_evaluated_on_some_of_its_classes():
    cfg = config(CLS)
    cfg.model.head.num_classes = cfg.model.data_preprocessor.num_classes = 20
    with pytest.raises(
        ValueError, match='num_classes is 20, but the data set of train'
    ):
        check_config(cfg)
    cfg.train_dataloader.dataset = dict(type='CustomDataset')  # of 20 classes
    check_config(cfg)
    cfg.model.head.num_classes = 5
    with pytest.raises(
        ValueError, match='head.num_classes is 5, but the data set of v'
    ):
        check_config(cfg)


# Annotations in COCO's format.


def coco_content():
    return dict(
        images=[
            dict(id=i, file_name=f'{i}.jpg', width=WIDTH, height=HEIGHT)
            for i in range(3)
        ],
        annotations=[
            dict(
                id=i,
                image_id=i,
                category_id=i,
                bbox=[4, 4, 20, 20],
                area=400,
                segmentation=[[4, 4, 24, 4, 24, 24]],
                iscrowd=0,
            )
            for i in range(3)
        ],
        categories=[dict(id=i, name=str(i)) for i in range(10)],
    )


@pytest.fixture
def coco(tmp_path):
    for i in range(3):
        save(tmp_path / f'images/{i}.jpg', noise(HEIGHT, WIDTH, 3))
    (tmp_path / 'coco.json').write_text(json.dumps(coco_content()))
    return tmp_path


def change(entries, **values):
    """Change the second of a list of the annotation file; None removes a key."""

    def apply(root):
        content = coco_content()
        for key, value in values.items():
            content[entries][1][key] = value
            if value is None:
                del content[entries][1][key]
        (root / 'coco.json').write_text(json.dumps(content))

    return apply


def write(text):
    return lambda root: (root / 'coco.json').write_text(text)


WHERE = 'Check data_root and {} of train_dataloader.dataset.'
FORMAT = 'See docs/datasets.md for the format.'
BOX = 'A box is [x, y, width, height] in pixels'
COCO_ERRORS = {
    'no file': (
        lambda root: (root / 'coco.json').unlink(),
        'Annotation file not found: {json}. ' + WHERE.format('ann_file'),
    ),
    'empty file': (write(''), '{json} is empty. Write or download it again.'),
    'no JSON': (
        write('<html>'),
        '{json} is not JSON (Expecting value: line 1 column 1 (char 0)). Write or '
        'download it again.',
    ),
    'cut off': (
        write('{"images": ['),
        '{json} is not JSON (Expecting value: line 1 column 13 (char 12)). Write or '
        'download it again.',
    ),
    'a list': (
        write('[]'),
        '{json} holds no dict with images, annotations, categories. ' + FORMAT,
    ),
    'no categories': (
        write('{"images": [], "annotations": []}'),
        '{json} has no list of categories. ' + FORMAT,
    ),
    'no images': (
        write('{"images": [], "annotations": [], "categories": []}'),
        '{json} lists no images. ' + FORMAT,
    ),
    'no file_name': (
        change('images', file_name=None),
        '1 of the images in {json} have no file_name: number 1. ' + FORMAT,
    ),
    'no bbox': (
        change('annotations', bbox=None),
        '1 of the annotations in {json} have no bbox: number 1. ' + FORMAT,
    ),
    'no area': (
        change('annotations', area=None),
        '1 of the annotations in {json} have no area: number 1. ' + FORMAT,
    ),
    'no image folder': (
        lambda root: (root / 'images').rename(root / 'pictures'),
        'Folder not found: {root}/images. ' + WHERE.format('data_prefix'),
    ),
    'absent image': (
        lambda root: (root / 'images/2.jpg').unlink(),
        '1 images are not in {root}/images: 2.jpg. ' + WHERE.format('data_prefix'),
    ),
    'negative width': (
        change('annotations', bbox=[24, 24, -20, 20]),
        '1 annotations with a box of negative width or height in {json}: id 1. '
        + f'{BOX}, not two corners.',
    ),
    'NaN': (
        change('annotations', bbox=[4, float('nan'), 20, 20]),
        f'1 annotations with a box of NaN or infinity in {{json}}: id 1. {BOX}.',
    ),
    'infinity': (
        change('annotations', bbox=[4, 4, float('inf'), 20]),
        f'1 annotations with a box of NaN or infinity in {{json}}: id 1. {BOX}.',
    ),
    'three numbers': (
        change('annotations', bbox=[4, 4, 20]),
        f'1 annotations with a box that is not four numbers in {{json}}: id 1. {BOX}.',
    ),
    'text': (
        change('annotations', bbox=['4', '4', '20', '20']),
        f'1 annotations with a box that is not four numbers in {{json}}: id 1. {BOX}.',
    ),
    'category out of range': (
        change('annotations', category_id=10),
        '1 annotations with an unknown category_id in {json}: id 1. Every category_id '
        'has to be the id of one of the categories.',
    ),
    'unknown image': (
        change('annotations', image_id=7),
        '1 annotations with an unknown image_id in {json}: id 1. Every image_id has '
        'to be the id of one of the images.',
    ),
    'id twice': (
        change('annotations', id=0),
        '1 ids of annotations occur more than once in {json}: 0. Number them anew.',
    ),
    'empty mask': (
        change('annotations', segmentation=[]),
        '1 annotations with no mask in {json}: id 1. Leave them out of the file, or '
        'train without masks: see docs/datasets.md.',
    ),
    'absent mask': (
        change('annotations', segmentation=None),
        '1 annotations with no mask in {json}: id 1. Leave them out of the file, or '
        'train without masks: see docs/datasets.md.',
    ),
    'other name of a class': (
        change('categories', name='one'),
        '1 classes of train_dataloader.dataset are not in the categories of {json}: 1. '
        'The file has 0, one, 2 and 7 more. Name its categories in metainfo.classes.',
    ),
}


@pytest.mark.parametrize('case', COCO_ERRORS)
def test_coco_annotations(coco, case):
    spoil, message = COCO_ERRORS[case]
    spoil(coco)
    with pytest.raises(ValueError) as caught:
        require_data(config(DET, coco), 'train')
    assert str(caught.value) == message.format(root=coco, json=coco / 'coco.json')


def test_annotations_of_test_images_may_be_unpublished(coco):
    content = coco_content()
    del content['annotations']
    (coco / 'coco.json').write_text(json.dumps(content))
    cfg = config(DET, coco)
    cfg.test_dataloader = cfg.val_dataloader
    require_data(cfg, 'test')
    with pytest.raises(ValueError, match='has no list of annotations'):
        require_data(cfg, 'val')


def test_boxes_of_no_size_are_left_out_and_reported(coco):
    """As mmdet does; COCO itself has such boxes."""
    change('annotations', bbox=[4, 4, 0, 20])(coco)
    cfg = config(DET, coco)
    require_data(cfg, 'train')
    (finding,) = check_split(cfg, 'train')
    assert finding.problem == (
        f'1 annotations with a box of no width or height in {coco}/coco.json: id 1'
    )
    with DefaultScope.overwrite_default_scope(DET):
        cfg.train_dataloader.dataset.filter_cfg = None
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert [len(dataset.get_data_info(i)['instances']) for i in range(3)] == [1, 0, 1]


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # by 90 degrees
    return dict(exif=exif)


def spoil_exif(root):
    save(root / 'images/1.jpg', noise(HEIGHT, WIDTH, 3), **turned())


IMAGE_FINDINGS = {
    'truncated': (lambda path: truncate(path), 'unreadable'),
    'zero bytes': (lambda path: path.write_bytes(b''), 'of zero bytes'),
    'web page': (lambda path: path.write_text('<html>'), 'unreadable'),
    'other size': (
        lambda path: save(path, noise(HEIGHT, WIDTH + 1, 3)),
        'of another size than annotated',
    ),
    # mmcv turns images, so boxes have to refer to the turned one.
    'turned': (
        lambda path: spoil_exif(path.parents[1]),
        'of another size than annotated',
    ),
}


@pytest.mark.parametrize('case', IMAGE_FINDINGS)
def test_images_of_coco(coco, case):
    spoil, problem = IMAGE_FINDINGS[case]
    spoil(coco / 'images/1.jpg')
    (finding,) = check_split(config(DET, coco), 'train')
    assert finding.problem == f'1 images {problem} in {coco}/images: 1.jpg'
    assert check_split(config(DET, coco), 'train', decode=False) == []


# Label maps.


@pytest.fixture
def masks(tmp_path):
    for i in range(3):
        save(tmp_path / f'images/{i}.jpg', noise(HEIGHT, WIDTH, 3))
        labels = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 12
        save(tmp_path / f'maps/{i}.png', labels.astype(np.uint8))
    return tmp_path


def labels(*shape, value=1, dtype=np.uint8):
    return lambda root: save(root / 'maps/1.png', np.full(shape, value, dtype))


MASK_ERRORS = {
    'no image folder': (
        lambda root: (root / 'images').rename(root / 'pictures'),
        'Folder not found: {root}/images. ' + WHERE.format('data_prefix'),
    ),
    'no folder of label maps': (
        lambda root: (root / 'maps').rename(root / 'masks'),
        'Folder not found: {root}/maps. Check data_prefix and seg_map_suffix of '
        'train_dataloader.dataset.',
    ),
    'other suffix': (
        lambda root: [x.rename(x.with_suffix('.JPG')) for x in root.glob('images/*')],
        'No images *.jpg in {root}/images. Check img_suffix of '
        'train_dataloader.dataset.',
    ),
    'no label map': (
        lambda root: (root / 'maps/2.png').unlink(),
        '1 label maps are not in {root}/maps: 2.png. Check data_prefix and '
        'seg_map_suffix of train_dataloader.dataset.',
    ),
}


@pytest.mark.parametrize('case', MASK_ERRORS)
def test_folders_of_label_maps(masks, case):
    spoil, message = MASK_ERRORS[case]
    spoil(masks)
    with pytest.raises(ValueError) as caught:
        require_data(config(SEG, masks), 'train')
    assert str(caught.value) == message.format(root=masks)


MASK_FINDINGS = {
    'other size': (labels(HEIGHT, WIDTH - 1), 'of another size than the label map'),
    'transposed': (labels(WIDTH, HEIGHT), 'of another size than the label map'),
    # Of the image alone.
    'turned': (spoil_exif, 'of another size than the label map'),
    'unknown labels': (labels(HEIGHT, WIDTH, value=12), 'with labels above 11'),
    'colours': (
        labels(HEIGHT, WIDTH, 3),
        'whose label map is not of one 8-bit channel',
    ),
    '16 bit': (
        labels(HEIGHT, WIDTH, dtype=np.uint16),
        'whose label map is not of one 8-bit channel',
    ),
    'empty': (labels(HEIGHT, WIDTH, value=0), 'without a labelled pixel'),
    'truncated': (
        lambda root: truncate(root / 'maps/1.png'),
        'with an unreadable label map',
    ),
    'zero bytes': (
        lambda root: (root / 'maps/1.png').write_bytes(b''),
        'with an unreadable label map',
    ),
}


@pytest.mark.parametrize('case', MASK_FINDINGS)
def test_label_maps(masks, case):
    spoil, problem = MASK_FINDINGS[case]
    spoil(masks)
    (finding,) = check_split(config(SEG, masks), 'train')
    assert finding.problem == f'1 images {problem} in {masks}/images: 1.jpg'
    assert finding.fatal == (case != 'empty')


def test_labels_that_are_classes(masks):
    """11 classes: 0 to 10, or 1 to 11 if 0 is unlabelled; 255 always is."""
    cfg = config(SEG, masks)
    labels(HEIGHT, WIDTH, value=255)(masks)
    save(masks / 'maps/2.png', np.full((HEIGHT, WIDTH), 11, np.uint8))
    cfg.train_dataloader.dataset.reduce_zero_label = False
    above, empty = check_split(cfg, 'train')
    assert above.problem == (
        f'2 images with labels above 10 in {masks}/images: 0.jpg, 2.jpg'
    )
    assert 'without a labelled pixel' in empty.problem


# Class folders.


@pytest.fixture
def folders(tmp_path):
    for split in ('train', 'val'):
        for i in range(10):
            save(tmp_path / f'{split}/{i}/image.png', noise(8, 8, 3))
    return tmp_path


def write_list(text):
    def apply(root):
        (root / 'meta').mkdir()
        (root / 'meta/train.txt').write_text(text)

    return apply


LAYOUT = 'Lay the images out as FOLDER/CLASS/IMAGE.'
LINES = 'Mend {root}/meta/train.txt: its lines are IMAGE LABEL.'
FOLDER_ERRORS = {
    'no folder': (
        lambda root: (root / 'train').rename(root / 'training'),
        'Folder not found: {root}/train. ' + WHERE.format('data_prefix'),
    ),
    'no class folders': (
        lambda root: [x.rename(root / f'val/{x.name}x') for x in root.glob('train/*')],
        'No class folders in {root}/train. ' + LAYOUT,
    ),
    'a class folder too many': (
        lambda root: (root / 'train/.cache').mkdir(),
        '11 class folders in {root}/train, but 10 classes in the config: .cache, 0, 1 '
        'and 8 more. Set num_classes of the model, or mend the folders: labels are '
        'their positions in the sorted list.',
    ),
    'empty list': (write_list(''), '{root}/meta/train.txt is empty. ' + LINES),
    'no labels': (
        write_list('0/image.png 0\n1/image.png\n'),
        '1 lines of {root}/meta/train.txt without a label from 0 to 9: line 2. '
        + LINES,
    ),
    'labels out of range': (
        write_list('0/image.png 0\n1/image.png 10\n'),
        '1 lines of {root}/meta/train.txt without a label from 0 to 9: line 2. '
        + LINES,
    ),
    'absent image': (
        write_list('0/image.png 0\n1/picture.png 1\n'),
        '1 images are not in {root}/train: 1/picture.png. '
        + WHERE.format('data_prefix'),
    ),
}


@pytest.mark.parametrize('case', FOLDER_ERRORS)
def test_class_folders(folders, case):
    spoil, message = FOLDER_ERRORS[case]
    spoil(folders)
    with pytest.raises(ValueError) as caught:
        require_data(config(CLS, folders), 'train')
    assert str(caught.value) == message.format(root=folders)


def test_images_of_class_folders(folders):
    (folders / 'train/3/image.png').unlink()
    (folders / 'train/4/image.png').write_bytes(b'')
    found = [x.problem for x in check_split(config(CLS, folders), 'train')]
    assert found == [
        f'1 class folders without an image in {folders}/train: 3',
        f'1 images of zero bytes in {folders}/train: 4/image.png',
    ]


def test_good_data(coco, masks, folders):
    for scope, root in ((DET, coco), (SEG, masks), (CLS, folders)):
        cfg = config(scope, root)
        assert check_split(cfg, 'train') == check_split(cfg, 'val') == []
        assert check_split(cfg, 'test') is not None  # of other data, which lack
    cfg.train_dataloader.dataset = dict(type='Mine', data_root='nowhere')
    with pytest.raises(ValueError, match='nowhere'):
        require_data(config(CLS, 'nowhere'), 'train')


# Images in training.


def seeded(scope, root, **options):
    with DefaultScope.overwrite_default_scope(scope):
        dataset = config(scope, root).train_dataloader.dataset
        return SeededDataset(dataset, **options)


def cut_end(path):
    # All the pixels are there, as far as Pillow is concerned.
    path.write_bytes(path.read_bytes()[:-2])


WAY_OUT = 'Replace it, take it out of the data set, or set skip_corrupt_images=True.'
READ_ERRORS = {
    'truncated JPEG': ('images/1.jpg', truncate, 'is truncated'),
    'JPEG without its end': ('images/1.jpg', cut_end, 'is truncated'),
    'zero bytes': ('images/1.jpg', lambda path: path.write_bytes(b''), 'is empty'),
    'web page': (
        'images/1.jpg',
        lambda path: path.write_text('<html>'),
        'is not an image',
    ),
    'truncated label map': ('maps/1.png', truncate, 'is truncated'),
    'empty label map': ('maps/1.png', lambda path: path.write_bytes(b''), 'is empty'),
}


@pytest.mark.parametrize('case', READ_ERRORS)
def test_images_in_training(masks, case):
    name, spoil, problem = READ_ERRORS[case]
    dataset = seeded(SEG, masks)
    spoil(masks / name)
    with pytest.raises(CorruptImageError) as caught:
        dataset[Draw(1, (SAMPLE, 0, 0, 1))]
    assert str(caught.value) == f'{masks / name} {problem}. {WAY_OUT}'
    assert dataset[Draw(0, (SAMPLE, 0, 0, 0))] is not None


def test_a_decoder_that_fills_up(masks, monkeypatch):
    """OpenCV before 4.12 gives grey where a JPEG file is cut off, without an error."""
    dataset = seeded(SEG, masks)
    truncate(masks / 'images/1.jpg')
    whole = noise(HEIGHT, WIDTH, 3)
    monkeypatch.setattr('mmcv.imfrombytes', lambda content, **_: whole.copy())
    # Label maps are read by it as well.
    dataset.pipeline.transforms.pop(1)
    with pytest.raises(CorruptImageError, match='1.jpg is truncated'):
        dataset[1]


def test_errors_of_transforms_stay_as_they_are(masks):
    dataset = seeded(SEG, masks)

    def fail(results):
        raise RuntimeError('a transform of mine')

    dataset.pipeline.transforms.append(fail)
    with pytest.raises(RuntimeError, match='^a transform of mine$'):
        dataset[1]


def names_drawn(root, workers):
    """Images that twelve draws give, and how often one was skipped."""
    dataset = seeded(SEG, root, skip_corrupt_images=True)
    draws = [Draw(i, (SAMPLE, 0, 0, i)) for i in range(12)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, sampler=draws, num_workers=workers, collate_fn=list
    )
    samples = [sample for batch in loader for sample in batch]
    names = [Path(sample['data_samples'].img_path).stem for sample in samples]
    return names, dataset.skipped.value


@pytest.mark.filterwarnings('ignore:Skipped')
def test_corrupt_images_are_skipped_and_counted(masks):
    for i in range(3, 12):
        shutil.copy(masks / 'images/0.jpg', masks / f'images/{i}.jpg')
        shutil.copy(masks / 'maps/0.png', masks / f'maps/{i}.png')
    # In the order of their names: 0, 1, 10, 11, 2, 3, ...
    order = sorted(map(str, range(12)))
    corrupt = {'1': 'images/1.jpg', '2': 'images/2.jpg', '5': 'maps/5.png'}
    for name in corrupt.values():
        truncate(masks / name)
    names, count = names_drawn(masks, workers=0)
    for name, expected in zip(names, order):
        assert (name == expected) == (expected not in corrupt)
        assert name not in corrupt
    # More than three if one of them was drawn in the place of another.
    assert 3 <= count < 12
    assert names_drawn(masks, workers=2) == (names, count)


def test_other_training_loops_do_not_skip():
    cfg = config(CLS)
    cfg.merge_from_dict({'train_cfg.type': 'MyLoop', 'skip_corrupt_images': True})
    with pytest.raises(ValueError) as caught:
        use_seeded_loop(cfg)
    assert str(caught.value) == (
        "skip_corrupt_images needs one of ['EpochBasedTrainLoop', "
        "'IterBasedTrainLoop'], got 'MyLoop'."
    )


def test_nothing_but_corrupt_images(masks):
    for path in masks.glob('images/*'):
        truncate(path)
    dataset = seeded(SEG, masks, skip_corrupt_images=True)
    with pytest.warns(UserWarning, match=r'Skipped: .*\.jpg is truncated\.$'):
        with pytest.raises(CorruptImageError, match='is truncated'):
            dataset[Draw(0, (SAMPLE, 0, 0, 0))]


# Images in evaluations.

EVALUATION_WAY_OUT = 'Replace it, or take it out of the data set.'
EVALUATION_ERRORS = [
    *((SEG, *error) for error in READ_ERRORS.values()),
    (DET, 'images/1.jpg', truncate, 'is truncated'),
    (DET, 'images/1.jpg', lambda path: path.write_bytes(b''), 'is empty'),
    (DET, 'images/1.jpg', lambda path: path.write_text('<html>'), 'is not an image'),
    (DET, 'images/1.jpg', lambda path: save(path, noise(10, 20000, 3)),
     'is of 20000 x 10 pixels, which the pipeline cannot process'),
    (CLS, 'val/1/image.png', truncate, 'is truncated'),
    (CLS, 'val/1/image.png', lambda path: path.write_bytes(b''), 'is empty'),
    (CLS, 'val/1/image.png', lambda path: path.write_text('<html>'), 'is not an image'),
]  # fmt: skip


def evaluated(scope, root, split='val'):
    """The data set of an evaluation, as tools/train.py and tools/test.py build it."""
    cfg = config(scope, root)
    if split == 'test':
        cfg.test_dataloader = cfg.val_dataloader
        options.enable_tta(cfg)
    check_images(cfg, split)
    check_images(cfg, split)  # as with the config of a work_dir
    with DefaultScope.overwrite_default_scope(scope):
        return DATASETS.build(cfg[f'{split}_dataloader'].dataset)


@pytest.mark.parametrize('case', range(len(EVALUATION_ERRORS)))
def test_images_in_evaluations(request, tmp_path, case):
    scope, name, spoil, problem = EVALUATION_ERRORS[case]
    request.getfixturevalue({DET: 'coco', SEG: 'masks', CLS: 'folders'}[scope])
    dataset = evaluated(scope, tmp_path)
    assert dataset.metainfo['classes'] and len(dataset) in (3, 10)
    spoil(tmp_path / name)
    with pytest.raises(CorruptImageError) as caught:
        dataset[1]
    assert str(caught.value) == f'{tmp_path / name} {problem}. {EVALUATION_WAY_OUT}'
    assert dataset[0] is not None


@pytest.mark.parametrize('name', ['images/1.jpg', 'maps/1.png'])
@pytest.mark.parametrize('split', ['val', 'test'])
def test_a_decoder_that_fills_up_in_evaluations(masks, monkeypatch, split, name):
    """Also with test-time augmentation, whose samples are lists."""
    dataset = evaluated(SEG, masks, split)
    whole = {name: dataset[1]}
    truncate(masks / name)
    monkeypatch.setattr(type(dataset.dataset), '__getitem__', lambda *_: whole[name])
    with pytest.raises(CorruptImageError, match=f'{name} is truncated'):
        dataset[1]


# Images that are unusual, but no error.


UNUSUAL = {
    'grey': (noise(HEIGHT, WIDTH), {}),
    'RGBA': (noise(HEIGHT, WIDTH, 4), {}),
    '16 bit': (noise(HEIGHT, WIDTH).astype(np.uint16) * 257, {}),
    '1x1': (noise(1, 1, 3), {}),
    '20000x10': (noise(10, 20000, 3), {}),
    'EXIF-rotated': (noise(HEIGHT, WIDTH, 3), turned()),
}


FULL = {
    DET: 'detection/mask-rcnn_mlla-t_fpn_1x_coco.py',
    SEG: 'segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512.py',
    CLS: 'classification/mlla-t_8xb128_in1k.py',
}
PREDICTIONS = {DET: 'pred_instances', SEG: 'pred_sem_seg', CLS: 'pred_score'}
# The demos resize them to less than a pixel; mmseg wants two rows and columns.
TOO_THIN = {
    ('demo', '20000x10', DET),
    ('demo', '20000x10', SEG),
    ('demo', '1x1', SEG),
    ('full', '1x1', SEG),
}


def write_everywhere(root, pixels, **kwargs):
    """One image, as data of any task; returns its size as mmcv reads it."""
    height, width = pixels.shape[:2]
    if kwargs:
        height, width = width, height
    save(root / 'images/0.png', pixels, **kwargs)
    save(root / 'maps/0.png', np.ones((height, width), np.uint8))
    for i in range(10):
        save(root / f'train/{i}/0.png', pixels, **kwargs)
    content = coco_content()
    content['images'] = [dict(id=0, file_name='0.png', width=width, height=height)]
    content['annotations'] = content['annotations'][:1]
    content['annotations'][0].update(
        bbox=[0, 0, width, height],
        area=width * height,
        segmentation=[[0, 0, width, 0, width, height, 0, height]],
    )
    (root / 'coco.json').write_text(json.dumps(content))
    return height, width


@pytest.mark.parametrize('scope', [DET, SEG, CLS])
@pytest.mark.parametrize('case', UNUSUAL)
@pytest.mark.parametrize('recipe', ['demo', 'full'])
def test_unusual_images(tmp_path, recipe, case, scope):
    """By the demo's and the published training pipeline, and by the demo's model."""
    pixels, options = UNUSUAL[case]
    size = write_everywhere(tmp_path, pixels, **options)
    cfg = config(scope, tmp_path, suffix='.png')
    dataset = cfg.train_dataloader.dataset
    if recipe == 'full':
        full = Config.fromfile(CONFIGS / FULL[scope])
        dataset.pipeline = full.train_dataloader.dataset.pipeline
    # Our detection configs leave out images below 32 pixels in training.
    dataset.pop('filter_cfg', None)
    assert check_split(cfg, 'train') == []
    with DefaultScope.overwrite_default_scope(scope):
        dataset = SeededDataset(dataset)
        draw = Draw(0, (SAMPLE, 0, 0, 0))
        if (recipe, case, scope) in TOO_THIN:
            with pytest.raises(CorruptImageError) as caught:
                dataset[draw]
            assert str(caught.value) == (
                f'{tmp_path}/images/0.png is of {size[1]} x {size[0]} pixels, which '
                f'the pipeline cannot process. {WAY_OUT}'
            )
            return
        sample = dataset[draw]
        assert sample['data_samples'].ori_shape == size
        if recipe == 'demo':
            model = build(cfg).eval()
            batch = {key: [value] for key, value in sample.items()}
            with torch.no_grad():
                (result,) = model.test_step(batch)
            assert PREDICTIONS[scope] in result


# Checkpoints.


def text(content):
    return lambda path: path.write_bytes(content)


def torch_file(content):
    return lambda path: torch.save(content, path)


CHECKPOINT_ERRORS = {
    'absent': (lambda path: None, 'Checkpoint not found: {path}'),
    'empty': (
        text(b''),
        '{path} is empty: a download failed. Delete it and fetch it again.',
    ),
    'web page': (
        text(b'<!DOCTYPE html>'),
        '{path} is a web page, not a checkpoint: the download went wrong. Delete it, '
        'open its address in a browser, and fetch the file again.',
    ),
    'list': (
        torch_file([1]),
        "{path} holds no weights: expected them at the top level, or under 'model' or "
        "'state_dict'.",
    ),
    'no weights': (
        torch_file(dict(epoch=3)),
        "{path} holds no weights: expected them at the top level, or under 'model' or "
        "'state_dict'.",
    ),
    'plain and averaged': (
        torch_file(dict(state_dict={}, state_dict_ema={})),
        '{path} holds plain and averaged weights. Choose with ema=False or ema=True, '
        "as in dict(type='Pretrained', checkpoint='{path}', ema=True).",
    ),
}


@pytest.mark.parametrize('case', CHECKPOINT_ERRORS)
def test_checkpoints(tmp_path, case):
    make, message = CHECKPOINT_ERRORS[case]
    path = tmp_path / 'file.pth'
    make(path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        find_weights(load_checkpoint_file(path), str(path))
    assert str(caught.value) == message.format(path=path)


def test_damaged_checkpoint(tmp_path):
    path = tmp_path / 'file.pth'
    torch.save(dict(state_dict=dict(weight=torch.zeros(1000))), path)
    truncate(path)
    with pytest.raises(ValueError) as caught:
        load_checkpoint_file(path)
    start = f'{path} is damaged, or not a checkpoint. Delete it and fetch it again. ('
    assert str(caught.value).startswith(start)


def test_checkpoint_of_another_network():
    own = build(config(DET)).state_dict()
    official = reference.official_weights('mlla-t')
    with pytest.raises(ValueError) as caught:
        check_fit(own, official, 'MLLA_T.pth')
    first, *_ = str(caught.value).splitlines()
    assert first.startswith('The weights of MLLA_T.pth do not fit the model (')


# Runs.

RUN_ERRORS = {
    'no config': (
        lambda: options.read_config('configs/nothing.py'),
        'Config not found: configs/nothing.py. See configs/ for ours.',
    ),
    'no checkpoint to resume': (
        lambda: options.set_resume(Config(dict(work_dir='x')), 'nothing.pth'),
        'Checkpoint to resume from not found: nothing.pth. Give --resume alone for the '
        'newest one of the work_dir.',
    ),
    'work_dir below a file': (
        lambda: require_work_dir(str(ROOT / 'setup.py' / 'work')),
        "The work_dir cannot be written to: [Errno 20] Not a directory: '"
        f"{ROOT / 'setup.py' / 'work'}'. Choose one with --work-dir.",
    ),
    'unknown launcher': (
        lambda: launch.processes('torchrun'),
        "Unknown launcher 'torchrun': choose from ('none', 'pytorch', 'slurm', 'mpi').",
    ),
}


@pytest.mark.parametrize('case', RUN_ERRORS)
def test_runs(case):
    start, message = RUN_ERRORS[case]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        start()
    assert str(caught.value) == message


def test_more_processes_than_gpus(monkeypatch):
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
    for name, value in zip(names, (2, 4, 2, 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ValueError) as caught:
        launch.set_up(ConfigDict(launcher='pytorch', model=dict()))
    assert str(caught.value) == (
        '4 processes were started on this machine, but it shows 2 GPUs. Ask for at '
        'most 2, or check CUDA_VISIBLE_DEVICES.'
    )


@pytest.mark.parametrize('gpus', ['0', 'two', '-1', '1.5'])
def test_number_of_gpus(run_tool, gpus):
    result = run_tool('bash', 'tools/dist_train.sh', 'x.py', gpus, check=False)
    assert result.returncode == 2
    assert result.stdout == f"Error: GPUS must be a positive number, got '{gpus}'.\n"


def test_port_in_use(run_tool):
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_tool(
            'bash', 'tools/dist_train.sh', 'x.py', 2, check=False,
            env=dict(PORT=str(port)),
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stdout == (
        f'Error: port {port} of this machine is in use, or no port. Set another one: '
        'PORT=...\n'
    )


def train(run_tool, root, work_dir, *more, processes):
    """An epoch of the classification demo."""
    options = {
        **{f'{x}_dataloader.dataset.data_root': root for x in ('train', 'val')},
        **{f'{x}_dataloader.persistent_workers': False for x in ('train', 'val')},
        'train_dataloader.batch_size': 5,
        'train_cfg.max_epochs': 1,
        'val_evaluator.topk': 1,
    }
    return run_tool(
        'python', 'tools/train.py', NANO[CLS], '--seed', 0, '--work-dir', work_dir,
        '--launcher', 'pytorch',
        '--cfg-options', *(f'{k}={v}' for k, v in options.items()), *more,
        check=False, processes=processes,
    )  # fmt: skip


def errors(result):
    """What the processes said."""
    return [x for x in result.stdout.splitlines() if x.startswith('Error: ')]


TOOL_ERRORS = {
    'work_dir': (
        ['train.py', '--work-dir', ROOT / 'setup.py' / 'work'],
        RUN_ERRORS['work_dir below a file'][1],
    ),
    'config of a training': (
        ['train.py', '--cfg-options', 'model.backbone.type=MLA'],
        "model.backbone.type is 'MLA', which is not registered: is 'MLLA' meant?",
    ),
    'config of a test': (
        ['test.py', NANO[CLS], '--cfg-options', 'model.backbone.type=MLA'],
        "model.backbone.type is 'MLA', which is not registered: is 'MLLA' meant?",
    ),
    'data': (
        ['train.py', '--cfg-options', 'val_dataloader.dataset.data_root=nowhere'],
        'Folder not found: nowhere/val. '
        'Check data_root and data_prefix of val_dataloader.dataset.',
    ),
}


@pytest.mark.parametrize('case', TOOL_ERRORS)
def test_tools(folders, monkeypatch, tmp_path, case):
    (tool, *arguments), message = TOOL_ERRORS[case]
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = '{NANO[CLS]}'\n"
        f"train_dataloader = dict(dataset=dict(data_root='{folders}'))\n"
        f"val_dataloader = dict(dataset=dict(data_root='{folders}'))\n"
        f"work_dir = '{tmp_path}/work'\n"
    )
    monkeypatch.setattr('sys.argv', [tool, str(path), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    assert caught.value.code == f'Error: {message}'


def test_corrupt_image_ends_training(run_tool, folders, tmp_path):
    """Whichever of the processes meets it."""
    truncate(folders / 'train/7/image.png')
    result = train(run_tool, folders, tmp_path / 'work', processes=2)
    assert result.returncode == 1
    (error,) = errors(result)
    assert error == f'Error: {folders}/train/7/image.png is truncated. {WAY_OUT}'


@pytest.mark.slow
def test_corrupt_image_ends_a_validation(run_tool, folders, tmp_path):
    """Images of an evaluation are never skipped."""
    truncate(folders / 'val/7/image.png')
    result = train(
        run_tool, folders, tmp_path / 'work', 'skip_corrupt_images=True', processes=2
    )
    assert result.returncode == 1
    message = f'{folders}/val/7/image.png is truncated. {EVALUATION_WAY_OUT}'
    assert errors(result) == [f'Error: {message}']


@pytest.mark.parametrize(
    'scope, fixture, name',
    [
        pytest.param(DET, 'coco', 'images/1.jpg', marks=pytest.mark.slow),
        (SEG, 'masks', 'maps/1.png'),
    ],
)
def test_corrupt_image_ends_a_test(
    run_tool, request, nano, tmp_path, scope, fixture, name
):
    request.getfixturevalue(fixture)
    truncate(tmp_path / name)
    cfg = config(scope, tmp_path)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_evaluator = cfg.val_evaluator
    if scope == DET:
        cfg.test_evaluator.ann_file = str(tmp_path / 'coco.json')
    cfg.dump(tmp_path / 'config.py')
    _, checkpoint = nano(scope)
    result = run_tool(
        'python', 'tools/test.py', tmp_path / 'config.py', checkpoint,
        '--work-dir', tmp_path / 'work', check=False,
    )  # fmt: skip
    assert result.returncode == 1
    message = f'{tmp_path / name} is truncated. {EVALUATION_WAY_OUT}'
    assert result.stdout.splitlines()[-1] == f'Error: {message}'
    assert 'Traceback' not in result.stdout


def test_skipped_images_of_all_processes_are_counted(run_tool, folders, tmp_path):
    for i in (2, 7):
        truncate(folders / f'train/{i}/image.png')
    result = train(
        run_tool, folders, tmp_path / 'work', 'skip_corrupt_images=True', processes=2
    )
    assert result.returncode == 0, result.stdout
    counts = re.findall(r'Epoch 1: (\d+) corrupt images skipped', result.stdout)
    # Others if one of the two was drawn in the place of another.
    names = re.findall(r'Skipped: (\S+) is truncated', result.stdout)
    assert counts == [str(len(names))] and len(names) >= 2
