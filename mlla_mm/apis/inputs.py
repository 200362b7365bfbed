# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pictures out of whatever inference is given: paths, folders, videos, arrays."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Set, Union

import mmcv
import numpy as np

InputType = Union[str, Path, np.ndarray]

PICTURE_SUFFIXES = (
    *('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'),
)
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')


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


def find_sources(
    inputs: Union[InputType, Sequence[InputType]],
    leave_out: Optional[Union[str, Path]] = None,
) -> List[Source]:
    """List the pictures and videos that the inputs stand for.

    Args:
        inputs (str | Path | np.ndarray | Sequence): A picture, a video, a folder, or
            several of them. Of a folder and all folders below it, in the order of their
            names, every file counts whose suffix is one of :data:`PICTURE_SUFFIXES` or
            :data:`VIDEO_SUFFIXES`. An array is a BGR picture (H, W, 3), uint8.
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
        elif Path(item).is_dir():
            for path in _files(Path(item), leave_out):
                name = path.relative_to(item).with_suffix('')
                sources.append(Source(path, _unique(str(name), names), str(path)))
        else:
            name = _unique(Path(item).stem, names)
            sources.append(Source(item, name, str(item)))
    return sources


def count_pictures(sources: Sequence[Source]) -> int:
    """Number of pictures in the sources; that in videos is what their headers say."""
    return sum(
        max(1, _open_video(source).frame_cnt)
        if source.is_video and Path(source.content).is_file()
        else 1
        for source in sources
    )


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
    """Frames per second of a video; 25 if it does not say."""
    return _open_video(source).fps or 25.0


def _read_picture(source: Source, load: Callable[[str], np.ndarray]) -> Picture:
    # One unreadable file shall not end the work on the others, and file systems and
    # decoders raise errors of many types.
    try:
        return Picture(source, load(str(source.content)))
    except Exception as error:
        return Picture(source, error=_reason(source, 'picture', error))


def _read_video(source: Source) -> Iterator[Picture]:
    if not Path(source.content).is_file():
        yield Picture(source, error=_reason(source, 'video'))
        return
    frame = -1
    for frame, image in enumerate(_open_video(source)):
        yield Picture(source, image, frame)
    if frame < 0:
        yield Picture(source, error=_reason(source, 'video'))


def _reason(source: Source, kind: str, error: Optional[Exception] = None) -> str:
    path = Path(source.content)
    if '://' in str(source.content):
        return f'cannot be read: {error}'
    if not path.is_file():
        return 'no such file'
    if path.stat().st_size == 0:
        return 'empty file'
    return f'cannot be decoded as a {kind}'


def _open_video(source: Source) -> mmcv.VideoReader:
    return mmcv.VideoReader(str(source.content))


def _is_video(path: Union[str, Path]) -> bool:
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _files(folder: Path, leave_out: Optional[Union[str, Path]]) -> List[Path]:
    suffixes = PICTURE_SUFFIXES + VIDEO_SUFFIXES
    left_out = Path(leave_out).resolve() if leave_out else None
    return sorted(
        path
        for path in folder.rglob('*')
        if path.suffix.lower() in suffixes
        and path.is_file()
        and left_out not in path.resolve().parents
    )


def _unique(name: str, taken: Set[str]) -> str:
    """``name``, with a number behind it if it is taken."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f'{name}_{count}'
    taken.add(candidate)
    return candidate


def _check_array(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            'An array must be a BGR picture (H, W, 3) of type uint8, got '
            f'{image.shape} of type {image.dtype}.'
        )
