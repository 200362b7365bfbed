# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import io
import os
import socket

import cv2
import mmcv
import mmengine
import numpy as np
import pytest
from PIL import ExifTags, Image

from mlla_mm.utils import images
from mlla_mm.utils.files import check_regular_file, file_problem
from mlla_mm.utils.images import (
    image_problem,
    image_size,
    max_pixels,
    open_image,
    read_image,
    size_problem,
)

from .. import bad_data
from ..bad_data import assert_says, noise, save

VARIABLE = 'OPENCV_IO_MAX_IMAGE_PIXELS'


# Formats.


def read_directly(path):
    with open_image(path) as image:
        return np.asarray(image.convert('RGB'))


def read_with_pillow(path):
    return mmcv.imread(path, backend='pillow')


def bytes_with_pillow(path):
    return mmcv.imfrombytes(path.read_bytes(), backend='pillow')


READERS = [read_directly, read_with_pillow, bytes_with_pillow]


@pytest.mark.parametrize('read', [*READERS, read_image, image_problem])
def test_postscript_starts_no_program(monkeypatch, tmp_path, read):
    marker = bad_data.fake_ghostscript(monkeypatch, tmp_path)
    path = tmp_path / 'photo.jpg'
    bad_data.postscript(path)
    if read is image_problem:
        assert_says(read(path), 'is not an image', 'JPEG')
    else:
        with pytest.raises((OSError, ValueError)):
            read(path)
    assert not marker.exists()
    with Image.open(path) as image, pytest.raises(OSError):
        image.load()
    assert marker.exists()


@pytest.mark.parametrize('format', ['DDS', 'EPS', 'ICO', 'PCX', 'SGI', 'TGA'])
@pytest.mark.parametrize('read', READERS)
def test_refused_formats(tmp_path, format, read):
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (64, 64)).save(path, format=format)
    with pytest.raises(OSError, match='cannot identify image file'):
        read(path)


@pytest.mark.parametrize('format', [*images.FORMATS, 'MPO'])
@pytest.mark.parametrize('read', READERS)
def test_formats(tmp_path, format, read):
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (30, 20), 'white').save(path, format=format)
    assert read(path).min() > 250
    # Older versions of OpenCV do not read GIF.
    known = cv2.imread(str(path)) is not None
    assert known or format == 'GIF'
    assert image_problem(path) == (None if known else 'cannot be decoded by OpenCV')


def test_backends_read_alike(tmp_path):
    """mmcv's 'pillow' makes a new image where it puts a colour behind grey ones."""
    for name, channels in (('grey.png', ()), ('alpha.png', (2,)), ('rgb.png', (3,))):
        save(tmp_path / name, np.full((4, 5, *channels), 255, np.uint8))
        assert (read_with_pillow(tmp_path / name) == 255).all()
        assert (read_image(tmp_path / name) == 255).all()


# Sizes.


def orientation(value):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif.tobytes()


@pytest.mark.parametrize(
    'exif, size',
    [
        *((orientation(i), (12, 8)) for i in range(5)),
        *((orientation(i), (8, 12)) for i in range(5, 9)),
        # What makes no sense turns nothing, in mmcv either.
        *((orientation(6)[:end], (12, 8)) for end in (9, -9)),
        *((exif, (12, 8)) for exif in (orientation(9), b'Exif\0\0')),
        *((b'Exif\0\0' + x, (12, 8)) for x in (b'II*\0\xff\xff\xff\xff', b'nonsense')),
    ],
)
def test_turned_images(tmp_path, exif, size):
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (12, 8)).save(path, exif=exif)
    with Image.open(path) as image:
        assert image_size(image) == size
    assert mmcv.imread(path).shape[1::-1] == size


@pytest.mark.parametrize('value', ['300000000', '300MB', '1000kb'])
def test_the_limit_is_opencvs(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    factor = {'MB': 2**20, 'kb': 2**10}.get(value[-2:], 1)
    assert max_pixels() == int(value.rstrip('MBkb')) * factor


@pytest.mark.parametrize('value', ['', '-1', '1e9', 'many\x1b[31m', '1GB'])
def test_a_limit_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=VARIABLE) as caught:
        max_pixels()
    assert str(caught.value).isprintable()


def test_bombs(tmp_path):
    path = tmp_path / 'bomb.png'
    bad_data.bomb(path)
    problem = image_problem(path)
    assert problem == size_problem(path)
    assert_says(problem, '1080000000 pixels', max_pixels(), VARIABLE)
    for read in READERS:
        with pytest.raises(Image.DecompressionBombError):
            read(path)
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert_says(caught.value, path, '1080000000 pixels', VARIABLE)


def test_a_file_of_zeros(tmp_path):
    """Of the disk it takes nothing; it is found before it fills the memory."""
    with (tmp_path / 'photo.png').open('wb') as file:
        file.truncate(2**40)
    assert_says(image_problem(tmp_path / 'photo.png'), f'{2**40} bytes', VARIABLE)


DECODE = """
import os, sys, warnings
import mlla_mm, cv2
from PIL import ExifTags, Image
warnings.simplefilter('ignore')
for path in sys.argv[1:]:
    for read in (lambda: cv2.imread(path, 0).shape, lambda: Image.open(path).size):
        try:
            print(read())
        except (cv2.error, Image.DecompressionBombError) as error:
            print(type(error).__name__)
print(os.environ['OPENCV_IO_MAX_IMAGE_PIXELS'])
"""


@pytest.mark.parametrize('limit', [None, '10000'])
def test_decoders_of_a_process(run_tool, tmp_path, limit):
    """It is set before OpenCV is imported, and a user's value stays."""
    paths = []
    for side in (100, 101, 16385):
        paths.append(tmp_path / f'{side}.png')
        paths[-1].write_bytes(bad_data.black_png(side, side))
    env = {VARIABLE: limit} if limit else {'UNUSED': ''}
    result = run_tool('python', '-c', DECODE, *paths, env=env)
    refused = ['error', 'DecompressionBombError']
    assert [line for line in result.stdout.splitlines() if line[:3] != '[ W'] == [
        *['(100, 100)'] * 2,
        *(refused if limit else ['(101, 101)'] * 2),
        *refused,
        limit or str(2**28),
    ]


# Files that are none.


@pytest.fixture(params=['pipe', 'device', 'socket', 'folder'])
def no_file(request, tmp_path):
    path = tmp_path / 'photo.jpg'
    if request.param == 'pipe':
        os.mkfifo(path)
    elif request.param == 'device':
        path.symlink_to('/dev/zero')
    elif request.param == 'folder':
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    return path


@pytest.mark.parametrize(
    'read', [check_regular_file, open_image, mmcv.imread, mmengine.fileio.get]
)
@pytest.mark.usefixtures('no_waiting')
def test_no_files(no_file, read):
    with pytest.raises(OSError, match='photo.jpg is a '):
        read(no_file)


@pytest.mark.usefixtures('no_waiting')
def test_problems_of_no_files(no_file):
    problem = file_problem(no_file)
    assert problem.startswith('is a ') and image_problem(no_file) == problem
    with pytest.raises(ValueError) as caught:
        read_image(no_file)
    assert_says(caught.value, no_file, problem, 'Replace it')


# Files that are damaged.


@pytest.fixture
def problem_of(tmp_path):
    def get(content):
        (tmp_path / 'photo.png').write_bytes(content)
        return image_problem(tmp_path / 'photo.png')

    return get


def test_every_cut_of_a_file_is_a_problem(problem_of):
    """Whatever Pillow raises for it."""
    for format in images.FORMATS:
        file = io.BytesIO()
        Image.fromarray(noise(9, 9, 3)).save(file, format=format)
        content = file.getvalue()
        for length in range(0, len(content) * 2 // 3, 7):
            problem = problem_of(content[:length])
            assert problem and problem.startswith(('is ', 'cannot ')), (format, length)


def test_changed_bytes_raise_nothing(problem_of):
    """Of a damaged file Pillow reads something, or its problem is told."""
    generator = np.random.default_rng(0)
    for format in images.FORMATS:
        file = io.BytesIO()
        Image.fromarray(noise(9, 9, 3)).save(file, format=format)
        for _ in range(60):
            content = bytearray(file.getvalue())
            for _ in range(3):
                content[generator.integers(len(content))] = generator.integers(256)
            problem = problem_of(bytes(content))
            assert problem is None or problem.isprintable()
