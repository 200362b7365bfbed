# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Small data sets of all three tasks, and what can be done to their files."""

import json
import os
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import EpsImagePlugin, ExifTags, Image

from mlla_mm.checks.data import require_data

from .nano import NANO

DET, SEG, CLS = 'mmdet', 'mmseg', 'mmpretrain'
WIDTH, HEIGHT = 60, 40
PREFIX = 'data_prefix of train_dataloader'


def assert_says(error, *words) -> None:
    missing = [word for word in map(str, words) if word not in str(error)]
    assert not missing, (missing, str(error))


def assert_refused(scope, root, file, *words) -> None:
    """A training is refused with an error that names a file and says some words."""
    with pytest.raises(ValueError) as caught:
        require_data(config(scope, root), 'train')
    assert_says(caught.value, root / file, *words)


def noise(*shape):
    return np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)


def save(path, pixels, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **kwargs)


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


# What is done to the file of an image.


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def cut_end(path):
    # Pillow still finds all pixels.
    path.write_bytes(path.read_bytes()[:-2])


def empty(path):
    path.write_bytes(b'')


def web_page(path):
    path.write_text('<html>')


def postscript(path):
    Image.new('RGB', (8, 8)).save(path, format='EPS')


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to('/dev/zero')


def link_to_nothing(path):
    path.unlink(missing_ok=True)
    path.symlink_to('nowhere')


def bomb(path):
    """A file of some kilobytes that takes 3 GB when it is decoded."""
    path.write_bytes(black_png(40000, 27000))


@lru_cache
def black_png(width, height) -> bytes:
    """A PNG file of one bit per pixel. It is made without an image in memory."""

    def chunk(kind, content):
        checksum = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + checksum

    compressor = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    rows = b''.join(compressor.compress(row) for _ in range(height))
    header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        [
            chunk(b'IHDR', header),
            chunk(b'IDAT', rows + compressor.flush()),
            chunk(b'IEND', b''),
        ]
    )


def fake_ghostscript(monkeypatch, folder: Path) -> Path:
    """Install a fake Ghostscript. Returns the file that it makes when it is run."""
    marker, program = folder / 'ghostscript ran', folder / 'bin/gs'
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntouch "{marker}"\n')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)  # or it is not looked for
    return marker


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return dict(exif=exif)


def turn(orientation):
    return lambda path: save(path, noise(HEIGHT, WIDTH, 3), **turned(orientation))


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
            cfg.val_evaluator.ann_file = f'{root}/coco.json'
        elif scope == SEG:
            dataset.data_prefix = dict(img_path='images', seg_map_path='maps')
            dataset.img_suffix = suffix
    return cfg


def coco_content():
    return dict(
        images=[
            dict(id=i, file_name=f'{i}.jpg', width=WIDTH, height=HEIGHT)
            for i in range(3)
        ],
        # One object of each class.
        annotations=[
            dict(
                id=i + 1,
                image_id=i % 3,
                category_id=i,
                bbox=[4, 4, 20, 20],
                area=400,
                segmentation=[[4, 4, 24, 4, 24, 24]],
                iscrowd=0,
            )
            for i in range(10)
        ],
        categories=[dict(id=i, name=str(i)) for i in range(10)],
    )


def make_coco(root: Path) -> Path:
    """Three images and their annotations in the format of COCO."""
    for i in range(3):
        save(root / f'images/{i}.jpg', noise(HEIGHT, WIDTH, 3))
    (root / 'coco.json').write_text(json.dumps(coco_content()))
    return root


def make_masks(root: Path) -> Path:
    """Three images and label maps of 12 values."""
    for i in range(3):
        save(root / f'images/{i}.jpg', noise(HEIGHT, WIDTH, 3))
        labels = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 12
        save(root / f'maps/{i}.png', labels.astype(np.uint8))
    return root


def make_folders(root: Path) -> Path:
    """An image of each of ten classes, for training and validation."""
    for split in ('train', 'val'):
        for i in range(10):
            # The same image in two splits would be reported.
            pixels = noise(8, 8, 3) if split == 'train' else ~noise(8, 8, 3)
            save(root / f'{split}/{i}/image.png', pixels)
    return root


# How the data of a task are made, and one of their images.
MAKE = {DET: make_coco, SEG: make_masks, CLS: make_folders}
IMAGE = {DET: 'images/1.jpg', SEG: 'images/1.jpg', CLS: 'train/1/image.png'}
