# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which image files are read, and what is wrong with one that is not.

OpenCV reads most images; Pillow those of configs that ask for it, and those of checks.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, BinaryIO, Optional, Union

from mmengine.fileio import LocalBackend, register_backend
from PIL import Image, UnidentifiedImageError

from .files import check_regular_file, file_problem
from .text import PATH_LIMIT, describe_error, printable

if TYPE_CHECKING:
    import numpy as np

FORMATS = ('BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')
"""Formats that Pillow may read, whatever a file is called, by its names for them.

Of the others one starts a program (EPS: Ghostscript), and all are rare.
"""

MAX_PIXELS_VARIABLE = 'OPENCV_IO_MAX_IMAGE_PIXELS'
DEFAULT_MAX_PIXELS = 2**28
"""16384 x 16384, or 768 MiB as a BGR array. OpenCV's default is four times as much."""

# A larger file is no image of so few pixels: 16 bits for each of four channels.
_MAX_BYTES_PER_PIXEL = 8
_UNITS = {'': 1, 'KB': 2**10, 'MB': 2**20}


def install() -> None:
    """Limit what OpenCV, Pillow and MMEngine read as images.

    - OpenCV and Pillow refuse more than :func:`max_pixels` pixels. OpenCV takes over
      the limit when it is imported: call this before.
    - mmcv's 'pillow' backend reads :data:`FORMATS` alone.
    - MMEngine reads the bytes of regular files alone: a pipe would be waited for, and
      a device may have no end.

    Workers of data loaders inherit it.

    Raises:
        ValueError: If the variable ``OPENCV_IO_MAX_IMAGE_PIXELS`` is no number.
    """
    os.environ.setdefault(MAX_PIXELS_VARIABLE, str(DEFAULT_MAX_PIXELS))
    # From the double of it on Pillow refuses; above it, it warns.
    Image.MAX_IMAGE_PIXELS = max_pixels() // 2
    register_backend('local', RegularFilesBackend, force=True, prefixes='')

    from mmcv.image import io

    io.Image = SimpleNamespace(open=open_image, new=Image.new)


def max_pixels() -> int:
    """Most pixels of an image: the variable ``OPENCV_IO_MAX_IMAGE_PIXELS``.

    Raises:
        ValueError: If it is no number as OpenCV understands it, such as 500MB.
    """
    value = os.environ.get(MAX_PIXELS_VARIABLE, str(DEFAULT_MAX_PIXELS))
    match = re.fullmatch(r'(\d+)([KM]B)?', value, re.IGNORECASE)
    if match is None:
        raise ValueError(
            f'{MAX_PIXELS_VARIABLE} must be a number of pixels, got {printable(value)}.'
        )
    return int(match[1]) * _UNITS[(match[2] or '').upper()]


def open_image(file: Union[str, Path, BinaryIO]) -> Image.Image:
    """Open an image as ``Image.open`` does, if it is one of :data:`FORMATS`.

    Args:
        file (str | Path | BinaryIO): A path, or an open file.

    Returns:
        Image.Image: The image; its pixels are not read yet.

    Raises:
        OSError: If the path is of no regular file, or if the image is of no such
            format (``UnidentifiedImageError``).
        Image.DecompressionBombError: If it has more than :func:`max_pixels` pixels.
    """
    if isinstance(file, (str, Path)):
        check_regular_file(file)
    return Image.open(file, formats=FORMATS)


def read_image(path: Union[str, Path], flag: str = 'color', **kwargs) -> 'np.ndarray':
    """Read an image as ``mmcv.imread`` does, with an error that names it.

    Args:
        path (str | Path): The file, or an address that MMEngine reads.
        flag (str): As of ``mmcv.imread``. Defaults to 'color'.
        **kwargs: As of ``mmcv.imread``.

    Returns:
        np.ndarray: The image, (H, W, 3) or, unchanged, (H, W), uint8 or uint16.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    import mmcv

    error = None
    try:
        image = mmcv.imread(path, flag, **kwargs)
        if image is not None:
            return image
    except FileNotFoundError:
        raise
    # Decoders and file systems raise errors of many types.
    except Exception as raised:
        error = raised
    raise ValueError(
        f'{printable(path, PATH_LIMIT)} {reading_problem(path, error)}. Replace it, or '
        'take it out of the data set.'
    ) from error


def reading_problem(path: Union[str, Path], error: Optional[Exception]) -> str:
    """Why an image could not be read, to stand behind its name.

    Args:
        path (str | Path): The file, or an address that MMEngine reads.
        error (Exception, optional): What the decoder raised, for what Pillow can read.
    """
    problem = None if '://' in str(path) else image_problem(path)
    if problem is None:
        problem = 'cannot be decoded' + (f' ({describe_error(error)})' if error else '')
    return problem


def image_problem(path: Union[str, Path]) -> Optional[str]:
    """What keeps Pillow from reading an image, to stand behind its name; or None."""
    problem = file_problem(path) or size_problem(path)
    if problem is not None:
        return problem
    try:
        with open_image(path) as image:
            image.load()
    except UnidentifiedImageError:
        return f'is not an image ({", ".join(FORMATS)})'
    except MemoryError:
        return 'does not fit into memory'
    # Pillow's plugins raise errors of many types for broken files.
    except Exception as error:
        cut = 'runcated' in str(error)
        return 'is truncated' if cut else f'is damaged ({describe_error(error)})'
    return None


def size_problem(path: Union[str, Path]) -> Optional[str]:
    """Whether a file has too many bytes or pixels for an image; None if not.

    It is said without decoding, whatever will decode the image.
    """
    limit = (
        f'and {max_pixels()} pixels are the limit: set {MAX_PIXELS_VARIABLE} if it is '
        'to be read'
    )
    size = os.path.getsize(path)
    if size > _MAX_BYTES_PER_PIXEL * max_pixels():
        return f'is of {size} bytes, {limit}'
    try:
        open_image(path).close()
    except Image.DecompressionBombError as error:
        pixels = re.search(r'\d+', str(error))[0]
        return f'is of {pixels} pixels, {limit}'
    # What Pillow cannot read another decoder may.
    except Exception:
        return None
    return None


class RegularFilesBackend(LocalBackend):
    """MMEngine's reader of local files, without pipes and devices."""

    def get(self, filepath: Union[str, Path]) -> bytes:
        check_regular_file(filepath)
        return super().get(filepath)
