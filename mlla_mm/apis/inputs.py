# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pictures out of what inference is given: paths, folders, videos, arrays."""

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

# The first bytes of AVI, of Matroska and WebM, and of MPEG program and transport
# streams. MOV and MP4 have one of the second names after their first four bytes.
_BEGINNINGS = (b'RIFF', b'\x1aE\xdf\xa3', b'\0\0\1', b'G')
_ATOMS = (b'ftyp', b'moov', b'mdat', b'wide', b'free', b'skip', b'pnot', b'uuid')


class Source(NamedTuple):
    """A picture or a video that is not read yet.

    Attributes:
        name (str): Path below the output folder, without a suffix. Each source has a
            name of its own.
        label (str | int): What results call the source: the path as the user gave it,
            or the position of an array in the inputs.
        array (np.ndarray, optional): The picture (H, W, 3), if the input is an array.
    """

    name: str
    label: Union[str, int]
    array: Optional[np.ndarray] = None

    @property
    def path(self) -> str:
        return str(self.label)

    @property
    def is_video(self) -> bool:
        return self.array is None and _suffix(self.path) in VIDEO_SUFFIXES


class Picture(NamedTuple):
    """A picture or a video frame, or the reason why there is none.

    Attributes:
        source (Source): The input that it comes from.
        image (np.ndarray, optional): BGR, (H, W, 3), uint8. None if there is an error.
        frame (int, optional): Position in the video, from 0. None for a picture.
        error (str, optional): What is wrong, to be printed after the name of the input.
    """

    source: Source
    image: Optional[np.ndarray] = None
    frame: Optional[int] = None
    error: Optional[str] = None


def find_sources(
    inputs: Union[InputType, Sequence[InputType]],
    leave_out: Optional[Union[str, Path]] = None,
) -> List[Source]:
    """List the pictures and videos in the inputs, without reading them.

    Args:
        inputs (str | Path | np.ndarray | Sequence): A picture, a video, a folder, a BGR
            array (H, W, 3) of type uint8, or a sequence of them. A folder means all
            files in it and in the folders below it whose suffix is in
            :data:`PICTURE_SUFFIXES` or :data:`VIDEO_SUFFIXES`, in the order of their
            names.
        leave_out (str | Path, optional): The folder of the results. If it lies in an
            input folder, its files are left out. Defaults to None.

    Returns:
        list[Source]: The sources.

    Raises:
        TypeError: If an input is neither a path nor an array.
        ValueError: If an array is not a BGR picture.
    """
    if isinstance(inputs, (str, Path, np.ndarray)):
        inputs = [inputs]
    names: Set[str] = set()
    sources = []
    for i, item in enumerate(inputs):
        if isinstance(item, np.ndarray):
            if item.ndim != 3 or item.shape[2] != 3 or item.dtype != np.uint8:
                raise ValueError(
                    'An array must be a BGR picture (H, W, 3) of type uint8, got '
                    f'{item.shape} of type {item.dtype}.'
                )
            sources.append(Source(_unique(f'{i:06d}', names), i, item))
        elif not isinstance(item, (str, Path)):
            raise TypeError(
                'An input must be a path, a BGR array (H, W, 3), or a list of them, '
                f'got {type(item).__name__}.'
            )
        elif os.path.isdir(item):
            for path in _files(Path(item), leave_out):
                name = _without_suffix(path.relative_to(item))
                sources.append(Source(_unique(name, names), str(path)))
        else:
            name = _without_suffix(Path(Path(item).name))
            sources.append(Source(_unique(name, names), str(item)))
    return sources


def count_pictures(sources: Sequence[Source]) -> int:
    """Number of pictures and frames. For a video, its header is believed."""
    return sum(_count_frames(x) if x.is_video else 1 for x in sources)


def read_pictures(
    sources: Sequence[Source], load: Callable[[str], np.ndarray]
) -> Iterator[Picture]:
    """Read the sources one after another.

    Args:
        sources (Sequence[Source]): What to read.
        load (Callable): Reads a picture file, BGR (H, W, 3).

    Yields:
        Picture: Every picture and every frame. A file that cannot be read gives a
        picture with ``error`` set.
    """
    for source in sources:
        if source.array is not None:
            yield Picture(source, source.array)
        elif source.is_video:
            yield from _read_video(source)
        else:
            yield _read_picture(source, load)


def fps(source: Source) -> float:
    """Frames per second of a video. 25 if the video gives no possible number."""
    rate = _open_video(source).fps
    return rate if 0.1 <= rate <= 1000 else 25.0


def is_utf8(path: Union[str, Path]) -> bool:
    """Whether OpenCV can be given the path of a video. It crashes if this is False."""
    # Python turns bytes of a name that are not UTF-8 into these characters.
    return not any('\ud800' <= character <= '\udfff' for character in str(path))


def _read_picture(source: Source, load: Callable[[str], np.ndarray]) -> Picture:
    path, problem = source.path, None
    if '://' not in path:
        problem = file_problem(path) or size_problem(path)
    if problem is None:
        try:
            return Picture(source, load(path))
        # File systems and decoders raise errors of many types.
        except Exception as error:
            problem = reading_problem(path, error)
    return Picture(source, error=problem)


def _read_video(source: Source) -> Iterator[Picture]:
    problem, frame = _video_problem(source.path), -1
    if problem is None:
        try:
            for frame, image in enumerate(_open_video(source)):
                yield Picture(source, image, frame)
            if frame < 0:
                problem = 'cannot be decoded as a video'
        except Exception as error:
            problem = f'cannot be decoded ({describe_error(error)})'
    if problem is not None:
        yield Picture(source, error=problem)


def _open_video(source: Source) -> mmcv.VideoReader:
    # FFmpeg reads names such as 'http:/a/b.mp4' and 'pipe:.mp4' as addresses. It reads
    # an absolute path as a path.
    return mmcv.VideoReader(os.path.abspath(source.path))


def _video_problem(path: str) -> Optional[str]:
    """What keeps a file from being opened as a video, or None.

    FFmpeg looks at the content of a file, not at its name. If film.mp4 were a playlist,
    FFmpeg would open the files that the playlist names, and wait for missing ones.
    """
    problem = file_problem(path)
    if problem is not None:
        return problem
    if not is_utf8(path):
        return 'has a name that is not UTF-8, and OpenCV cannot read such a video'
    with open(path, 'rb') as file:
        start = file.read(8)
    if start.startswith(_BEGINNINGS) or start[4:] in _ATOMS:
        return None
    return 'is not a video (AVI, Matroska, MOV, MPEG, MPEG-4, WebM)'


def _count_frames(source: Source) -> int:
    # A header may give something that is not a number.
    with suppress(Exception):
        if _video_problem(source.path) is None:
            return max(1, _open_video(source).frame_cnt)
    return 1


def _files(folder: Path, leave_out: Optional[Union[str, Path]]) -> List[Path]:
    left_out = Path(os.path.realpath(leave_out)) if leave_out else None
    return sorted(
        path
        for parent, _, names in os.walk(folder)
        for path in (Path(parent, name) for name in names)
        if _suffix(path) in PICTURE_SUFFIXES + VIDEO_SUFFIXES
        # Path.resolve() would raise an error for a link to itself.
        and left_out not in Path(os.path.realpath(path)).parents
    )


def _suffix(path: Union[str, Path]) -> str:
    return Path(path).suffix.lower()


def _without_suffix(path: Path) -> str:
    stem = path.name[: len(path.name) - len(path.suffix)]
    # The rest of '...mp4' is '..', the name of another folder.
    return str(path.with_name(stem) if stem.strip('.') else path)


def _unique(name: str, taken: Set[str]) -> str:
    """The name, with a number added if a file or a folder has this name already."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f'{name}_{count}'
    taken.update([candidate, *map(str, PurePath(candidate).parents)])
    return candidate
