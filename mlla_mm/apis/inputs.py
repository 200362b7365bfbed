# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pictures out of whatever inference is given: paths, folders, videos, arrays."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePath
from typing import List, NamedTuple, Optional, Sequence, Set, Union

import mmcv
import numpy as np

from ..utils.files import file_problem
from ..utils.images import reading_problem, size_problem
from ..utils.text import describe_error

InputType = Union[str, Path, np.ndarray]

PICTURE_SUFFIXES = (
    *('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'),
)
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')

# How videos begin: AVI, Matroska and WebM, MPEG programs and transports; and what
# stands behind four bytes of MOV and MP4.
_BEGINNINGS = (b'RIFF', b'\x1aE\xdf\xa3', b'\0\0\1', b'G')
_ATOMS = (b'ftyp', b'moov', b'mdat', b'wide', b'free', b'skip', b'pnot', b'uuid')


class Source(NamedTuple):
    """One input: a picture or a video, not yet read."""

    content: InputType
    name: str
    """Path below the output folder, without a suffix; no two sources share it."""

    label: Union[str, int]
    """What results call it: the path as given, or the position of an array."""

    @property
    def is_video(self) -> bool:
        return not isinstance(self.content, np.ndarray) and _is_video(self.content)


class Picture(NamedTuple):
    """A picture of a source, or the reason why there is none."""

    source: Source
    image: Optional[np.ndarray] = None
    """BGR, (H, W, 3)."""

    frame: Optional[int] = None
    """Position in the video, from 0."""

    error: Optional[str] = None
    """Why it cannot be read or predicted, to stand behind its name."""

    def failed(self, error: Exception) -> 'Picture':
        """The picture whose test pipeline or prediction raised an error."""
        height, width = self.image.shape[:2]
        size = f'{width} x {height} pixels'
        return self._replace(
            error=f'cannot be processed, at {size} ({describe_error(error)})'
        )


def find_sources(
    inputs: Union[InputType, Sequence[InputType]],
    leave_out: Optional[Union[str, Path]] = None,
) -> List[Source]:
    """List the pictures and videos that the inputs stand for.

    Args:
        inputs (str | Path | np.ndarray | Sequence): A picture, a video, a folder, or
            several of them. Of a folder and all folders below it, in the order of their
            names, everything but folders counts whose suffix is one of
            :data:`PICTURE_SUFFIXES` or :data:`VIDEO_SUFFIXES`. An array is a BGR
            picture (H, W, 3), uint8.
        leave_out (str | Path, optional): Folder below an input folder that is no
            input: that of the results. Defaults to None.

    Returns:
        list[Source]: The sources, none of them read.

    Raises:
        TypeError: If an input is of another type.
        ValueError: If an array is no BGR picture.
    """
    if isinstance(inputs, (str, Path, np.ndarray)):
        inputs = [inputs]
    names: Set[str] = set()
    sources = []
    for i, item in enumerate(inputs):
        if isinstance(item, np.ndarray):
            _check_array(item)
            sources.append(Source(item, _unique(f'{i:06d}', names), i))
        elif not isinstance(item, (str, Path)):
            raise TypeError(
                'Inputs are paths and BGR arrays (H, W, 3), or lists of them, got '
                f'{type(item).__name__}.'
            )
        elif os.path.isdir(item):
            for path in _files(Path(item), leave_out):
                name = _without_suffix(path.relative_to(item))
                sources.append(Source(path, _unique(name, names), str(path)))
        else:
            name = _unique(_without_suffix(Path(Path(item).name)), names)
            sources.append(Source(item, name, str(item)))
    return sources


def count_pictures(sources: Sequence[Source]) -> int:
    """Number of pictures in the sources; that in videos is what their headers say."""
    return sum(map(_count, sources))


def read_pictures(
    sources: Sequence[Source], load: Callable[[str], np.ndarray]
) -> Iterator[Picture]:
    """Read the sources one after another.

    Args:
        sources (Sequence[Source]): What to read.
        load (Callable): Reads a picture file, BGR (H, W, 3).

    Yields:
        Picture: Every picture and frame; for an unreadable file one with ``error`` set.
    """
    for source in sources:
        if isinstance(source.content, np.ndarray):
            yield Picture(source, source.content)
        elif source.is_video:
            yield from _read_video(source)
        else:
            yield _read_picture(source, load)


def fps(source: Source) -> float:
    """Frames per second of a video; 25 if it says nothing, or nothing possible."""
    rate = _open_video(source).fps
    return rate if 0.1 <= rate <= 1000 else 25.0


def _read_picture(source: Source, load: Callable[[str], np.ndarray]) -> Picture:
    path = str(source.content)
    problem = None
    if '://' not in path:
        problem = file_problem(path) or size_problem(path)
    if problem is None:
        # One unreadable file shall not end the work on the others, and file systems and
        # decoders raise errors of many types.
        try:
            return Picture(source, load(path))
        except Exception as error:
            problem = reading_problem(path, error)
    return Picture(source, error=problem)


def _read_video(source: Source) -> Iterator[Picture]:
    problem, frame = _video_problem(source.content), -1
    if problem is None:
        try:
            for frame, image in enumerate(_open_video(source)):
                yield Picture(source, image, frame)
        except Exception as error:
            problem = f'cannot be decoded ({describe_error(error)})'
        if frame < 0 and problem is None:
            problem = 'cannot be decoded as a video'
    if problem is not None:
        yield Picture(source, error=problem)


def _open_video(source: Source) -> mmcv.VideoReader:
    # FFmpeg takes names such as 'http:/a/b.mp4' and 'pipe:.mp4' for addresses, and an
    # absolute path for a path.
    return mmcv.VideoReader(os.path.abspath(source.content))


def _video_problem(path: Union[str, Path]) -> Optional[str]:
    """What keeps a file from being opened as a video, or None.

    FFmpeg goes by what is in a file. In a playlist called film.mp4 it would find the
    names of other files, open them, and wait for those that are not there.
    """
    problem = file_problem(path)
    if problem is None and not is_utf8(path):
        problem = 'has a name that is not UTF-8, by which OpenCV reads no video'
    if problem is None:
        with open(path, 'rb') as file:
            start = file.read(8)
        if not start.startswith(_BEGINNINGS) and start[4:] not in _ATOMS:
            problem = 'is not a video (AVI, Matroska, MOV, MPEG, MPEG-4, WebM)'
    return problem


def is_utf8(path: Union[str, Path]) -> bool:
    """Whether a path can be given to OpenCV's videos, which crash if it is not."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _count(source: Source) -> int:
    if source.is_video and _video_problem(source.content) is None:
        # A header may say what is no number.
        with suppress(Exception):
            return max(1, _open_video(source).frame_cnt)
    return 1


def _is_video(path: Union[str, Path]) -> bool:
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _files(folder: Path, leave_out: Optional[Union[str, Path]]) -> List[Path]:
    suffixes = PICTURE_SUFFIXES + VIDEO_SUFFIXES
    left_out = Path(os.path.realpath(leave_out)) if leave_out else None
    return sorted(
        path
        for parent, _, names in os.walk(folder)
        for path in (Path(parent, name) for name in names)
        if path.suffix.lower() in suffixes
        # Not resolve(), which raises an error for a link to itself.
        and left_out not in Path(os.path.realpath(path)).parents
    )


def _without_suffix(path: Path) -> str:
    stem = path.name[: len(path.name) - len(path.suffix)]
    # What is left of '...mp4' would be the name of another folder.
    return str(path.with_name(stem) if stem.strip('.') else path)


def _unique(name: str, taken: Set[str]) -> str:
    """``name``, with a number behind it if it is taken, also as that of a folder."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f'{name}_{count}'
    taken.update([candidate, *map(str, PurePath(candidate).parents)])
    return candidate


def _check_array(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            'An array must be a BGR picture (H, W, 3) of type uint8, got '
            f'{image.shape} of type {image.dtype}.'
        )
