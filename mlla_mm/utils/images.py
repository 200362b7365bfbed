# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which image files are read, and why another one cannot be read.

OpenCV reads most images. Pillow reads those of configs that ask for it, and label maps.
"""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, Optional, Tuple, Union

from mmengine.fileio import LocalBackend, register_backend
from PIL import ExifTags, Image, UnidentifiedImageError

from .archives import (
    file_size,
    is_file,
    is_folder,
    locate,
    open_file,
    read_member,
    scan_folder,
)
from .files import check_regular_file, file_problem
from .text import PATH_LIMIT, describe_error, printable

if TYPE_CHECKING:
    import numpy as np

FORMATS = ('BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')
"""Pillow's names of the formats that it may read. The name of a file does not matter.

The other formats are rare, and one of them starts a program (EPS: Ghostscript).
"""

MAX_PIXELS_VARIABLE = 'OPENCV_IO_MAX_IMAGE_PIXELS'
DEFAULT_MAX_PIXELS = 2**28
"""16384 x 16384, or 768 MiB as a BGR array. OpenCV's default is four times as much."""

# Four channels of 16 bits: a larger file is no image of so few pixels.
_MAX_BYTES_PER_PIXEL = 8
# The last bytes of a JPEG and of a PNG file, by the first two.
_ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}
_UNITS = {'': 1, 'KB': 2**10, 'MB': 2**20}


def install() -> None:
    """Limit what OpenCV, Pillow and MMEngine read as images.

    - OpenCV and Pillow refuse more than :func:`max_pixels` pixels. OpenCV reads the
      limit when it is imported: call this function before.
    - mmcv's 'pillow' backend reads :data:`FORMATS` alone.
    - MMEngine reads regular files alone: a pipe would be waited for, and a device may
      have no end.

    Workers of data loaders inherit these limits.

    Raises:
        ValueError: If the variable ``OPENCV_IO_MAX_IMAGE_PIXELS`` is no number.
    """
    os.environ.setdefault(MAX_PIXELS_VARIABLE, str(DEFAULT_MAX_PIXELS))
    # Pillow refuses more than twice this number of pixels, and warns from it on.
    Image.MAX_IMAGE_PIXELS = max_pixels() // 2
    register_backend('local', RegularFilesBackend, force=True, prefixes='')

    from mmcv.image import io

    io.Image = SimpleNamespace(open=open_image, new=Image.new)


def max_pixels() -> int:
    """The most pixels of an image, from ``OPENCV_IO_MAX_IMAGE_PIXELS``.

    Raises:
        ValueError: If the variable is no number that OpenCV understands, such as 500MB.
    """
    value = os.environ.get(MAX_PIXELS_VARIABLE, str(DEFAULT_MAX_PIXELS))
    match = re.fullmatch(r'(\d+)([KM]B)?', value, re.IGNORECASE)
    if match is None:
        raise ValueError(
            f'{MAX_PIXELS_VARIABLE} must be a number of pixels, such as '
            f'{DEFAULT_MAX_PIXELS}, but it is {printable(value)}.'
        )
    return int(match[1]) * _UNITS[(match[2] or '').upper()]


def open_image(file: Union[str, Path, BinaryIO]) -> Image.Image:
    """Open an image as ``Image.open`` does, if it is one of :data:`FORMATS`.

    Args:
        file (str | Path | BinaryIO): A path, or an open file.

    Returns:
        Image.Image: The image; its pixels are not read yet.

    Raises:
        OSError: If the path is no regular file, or if the image has another format
            (``UnidentifiedImageError``).
        Image.DecompressionBombError: If it has more than :func:`max_pixels` pixels.
    """
    if isinstance(file, (str, Path)):
        check_regular_file(file)
        if locate(file) is not None:
            file = open_file(file)
    return Image.open(file, formats=FORMATS)


def read_image(
    path: Union[str, Path], flag: str = 'color', **kwargs: Any
) -> 'np.ndarray':
    """Read an image as ``mmcv.imread`` does, with an error that names the file.

    Args:
        path (str | Path): The file, or an address that MMEngine can read.
        flag (str): As in ``mmcv.imread``. Defaults to 'color'.
        **kwargs: As in ``mmcv.imread``.

    Returns:
        np.ndarray: The image, (H, W, 3), or (H, W) for some flags; uint8 or uint16.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the image cannot be read.
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
    """Why reading an image failed, as words that follow its name.

    Args:
        path (str | Path): The file, or an address that MMEngine can read.
        error (Exception, optional): What the decoder raised. It is named if
            :func:`image_problem` finds nothing wrong with the file.
    """
    problem = None if '://' in str(path) else image_problem(path)
    if problem is None:
        problem = 'cannot be decoded' + (f' ({describe_error(error)})' if error else '')
    return problem


def image_problem(path: Union[str, Path], backend: str = 'cv2') -> Optional[str]:
    """Why an image cannot be read: the one check of training, tools and data sets.

    The file has to be a regular one with something in it, within the limits of
    :func:`size_problem`. Pillow has to decode all of it, which finds files that are cut
    off and says what is wrong with damaged ones. What reads the image in training has
    to decode it, too.

    Args:
        path (str | Path): The file.
        backend (str): What reads the image in training: mmcv's ``imdecode_backend``.
            Defaults to 'cv2', which is OpenCV.

    Returns:
        str | None: Words that follow the file's name, such as 'is truncated'. None if
        the image can be read.
    """
    import mmcv

    def decode() -> Any:
        # This reads TIFF files that Pillow does not know.
        if backend != 'tifffile':
            with open_image(path) as image:
                image.load()
        return mmcv.imread(path, backend=backend)

    return try_decoding(path, decode)[1]


def try_decoding(
    path: Union[str, Path], decode: Callable[[], Any]
) -> Tuple[Any, Optional[str]]:
    """Decode an image whose size is allowed, with words for what may be wrong.

    Args:
        path (str | Path): The file.
        decode (callable): Reads it. It gives None where OpenCV does.

    Returns:
        tuple[Any, str | None]: What ``decode`` gives, and None; or None, and words as
        :func:`image_problem` gives them.
    """
    problem = file_problem(path) or size_problem(path)
    if problem is not None:
        return None, problem
    try:
        decoded = decode()
    except UnidentifiedImageError:
        return None, f'is not an image ({", ".join(FORMATS)})'
    except MemoryError:
        return None, 'does not fit into memory'
    # Decoders raise errors of many types for broken files.
    except Exception as error:
        if 'runcated' in str(error):
            return None, 'is truncated'
        return None, f'cannot be decoded ({describe_error(error)})'
    # OpenCV returns None for what it cannot decode.
    return decoded, None if decoded is not None else 'cannot be decoded by OpenCV'


def size_problem(path: Union[str, Path]) -> Optional[str]:
    """Whether a file has too many bytes or pixels for an image. Nothing is decoded.

    Args:
        path (str | Path): A regular file.

    Returns:
        str | None: Words that follow the file's name. None if its size is allowed, or
        if Pillow cannot tell the number of pixels.
    """
    limit = (
        f'and {max_pixels()} pixels are the limit: set {MAX_PIXELS_VARIABLE} to read '
        'it all the same'
    )
    size = file_size(path)
    if size > _MAX_BYTES_PER_PIXEL * max_pixels():
        return f'is of {size} bytes, {limit}'
    try:
        open_image(path).close()
    except Image.DecompressionBombError as error:
        pixels = re.findall(r'\d+', str(error))[0]
        return f'is of {pixels} pixels, {limit}'
    # Another decoder may read what Pillow cannot.
    except Exception:
        return None
    return None


def lacks_end(path: Union[str, Path]) -> bool:
    """Whether a JPEG or PNG file does not end as such files do.

    It may have been cut off then, although OpenCV before version 4.12 decodes it
    without an error. It may also have other data behind the image:
    :func:`image_problem` tells. This look at a few bytes is cheap enough for training.

    Args:
        path (str | Path): The file. One that cannot be opened gives False.
    """
    try:
        with open_file(path) as file:
            end = _ENDS.get(file.read(2))
            if end is None:
                return False
            file.seek(-len(end), os.SEEK_END)
            return file.read() != end
    except (OSError, ValueError):  # no local file, or a file of fewer bytes
        return False


def image_size(image: Image.Image) -> Tuple[int, int]:
    """Width and height of an image as mmcv reads it: turned as its EXIF data say.

    Args:
        image (Image.Image): The image as Pillow opens it.
    """
    width, height = image.size
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
    # mmcv does not turn an image whose EXIF data are damaged.
    except Exception:
        turned = False
    return (height, width) if turned else (width, height)


class RegularFilesBackend(LocalBackend):
    """MMEngine's reader of local files: no pipes and devices, but tar archives.

    See :mod:`mlla_mm.utils.archives` for paths into archives.
    """

    def get(self, filepath: Union[str, Path]) -> bytes:
        place = locate(filepath)
        if place is not None:
            return read_member(place, filepath)
        check_regular_file(filepath)
        return super().get(filepath)

    def get_text(self, filepath: Union[str, Path], encoding: str = 'utf-8') -> str:
        if locate(filepath) is None:
            return super().get_text(filepath, encoding)
        with io.TextIOWrapper(open_file(filepath), encoding) as file:
            return file.read()

    def exists(self, filepath: Union[str, Path]) -> bool:
        return super().exists(filepath) or is_file(filepath) or is_folder(filepath)

    def isdir(self, filepath: Union[str, Path]) -> bool:
        return is_folder(filepath)

    def isfile(self, filepath: Union[str, Path]) -> bool:
        return is_file(filepath)

    def list_dir_or_file(
        self,
        dir_path: Union[str, Path],
        list_dir: bool = True,
        list_file: bool = True,
        suffix: Union[None, str, Tuple[str, ...]] = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        if locate(dir_path) is None:
            return super().list_dir_or_file(
                dir_path, list_dir, list_file, suffix, recursive
            )
        return _list_archive(dir_path, '', list_dir, list_file, suffix, recursive)


def _list_archive(
    folder: Union[str, Path],
    prefix: str,
    dirs: bool,
    files: bool,
    suffix: Union[None, str, Tuple[str, ...]],
    recursive: bool,
) -> Iterator[str]:
    """What MMEngine's ``list_dir_or_file`` lists, in a folder of an archive."""
    for entry in scan_folder(folder):
        name = prefix + entry.name
        if entry.is_file():
            if files and not entry.name.startswith('.'):
                if suffix is None or name.endswith(suffix):
                    yield name
            continue
        if dirs:
            yield name
        if recursive:
            yield from _list_archive(
                entry.path, f'{name}/', dirs, files, suffix, recursive
            )
