# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Files that inference writes: drawn pictures and videos, label maps, results."""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import cv2
import numpy as np
from mmengine.fileio import dump

from ..utils.files import write_whole
from ..utils.text import PATH_LIMIT, printable
from .inputs import Picture, Source, fps, is_utf8

RESULTS = 'results.json'
# A summary names so many skipped files at most.
_NAMED = 10


class Output:
    """The folder that inference writes into.

    Files of the same names are replaced. Nothing is written through a link that was in
    the folder before.

    Args:
        folder (str | Path): The folder. It is created if it does not exist.

    Raises:
        ValueError: If the folder cannot be made, or if ``results.json`` in it is itself
            a folder.
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f'The output folder cannot be made: {error}. Choose another one.'
            ) from error
        # The video that is being written, which lies at a path.
        self._video: Optional[Tuple[Source, Path, cv2.VideoWriter]] = None
        results = self.folder / RESULTS
        if results.is_dir():
            raise ValueError(
                f'{results} is a folder, but the results go into a file of this name. '
                'Remove the folder, or choose another output folder.'
            )

    def write_drawn(self, picture: Picture, drawn: np.ndarray) -> str:
        """Write a drawn picture, or add a drawn frame to its video.

        Args:
            picture (Picture): The picture or frame before it was drawn on.
            drawn (np.ndarray): RGB, (H, W, 3).

        Returns:
            str: Path of the picture or of the video.
        """
        image = np.ascontiguousarray(drawn[..., ::-1])
        if picture.frame is None:
            return self._write(image, 'drawn', picture, '.jpg')
        if self._video is None or self._video[0] is not picture.source:
            self._close_video()
            path = self._place('drawn', f'{picture.source.name}.mp4')
            writer = _open_writer(path, fps(picture.source), image)
            self._video = picture.source, path, writer
        _, path, writer = self._video
        writer.write(image)
        return str(path)

    def write_label_map(self, picture: Picture, labels: np.ndarray) -> str:
        """Write the labels of all pixels (H, W) as a PNG file. Returns its path."""
        return self._write(labels, 'label_maps', picture, '.png')

    def finish(self, results: List[Dict[str, Any]]) -> None:
        """Write the results, and finish the last video."""
        self._close_video()
        text = dump(results, file_format='json')
        write_whole(self.folder / RESULTS, text.encode())

    def _write(
        self, image: np.ndarray, kind: str, picture: Picture, suffix: str
    ) -> str:
        name = picture.source.name
        if picture.frame is not None:
            name = f'{name}/{picture.frame:06d}'
        # imwrite() would look for the suffix in the name.
        encoded, content = cv2.imencode(suffix, image)
        if not encoded:
            height, width = image.shape[:2]
            raise ValueError(f'a {suffix} file cannot hold {width} x {height} pixels')
        # with_suffix() would take what follows a dot in the name for a suffix.
        path = self._place(kind, f'{name}{suffix}')
        path.write_bytes(content.tobytes())
        return str(path)

    def _place(self, kind: str, name: str) -> Path:
        """Make room for a file, and refuse a path that leads out of the folder."""
        path = self.folder / kind / name
        root = os.path.realpath(self.folder)
        if not Path(os.path.realpath(path.parent)).is_relative_to(root):
            raise OSError(f'{printable(path.parent, PATH_LIMIT)} leads out of {root}')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return path

    def _close_video(self) -> None:
        if self._video is not None:
            self._video[2].release()
        self._video = None


def _open_writer(path: Path, rate: float, image: np.ndarray) -> cv2.VideoWriter:
    # FFmpeg would read the relative path 'pipe:.mp4' as an address.
    name = os.path.abspath(path)
    if not is_utf8(name):
        raise ValueError('OpenCV cannot write a video whose path is not UTF-8')
    codec = cv2.VideoWriter.fourcc(*'mp4v')
    writer = cv2.VideoWriter(name, codec, rate, image.shape[1::-1])
    if not writer.isOpened():
        raise OSError(f'OpenCV cannot write the video {path}.')
    return writer


def summary(results: List[Dict[str, Any]], folder: Union[str, Path]) -> List[str]:
    """Say what was written, and which inputs were skipped and why.

    Characters in file names that would move a terminal's cursor are escaped.

    Args:
        results (list[dict]): What :class:`mlla_mm.apis.Inferencer` returned.
        folder (str | Path): The folder that it wrote into.

    Returns:
        list[str]: Lines to print.
    """
    skipped = [result for result in results if 'error' in result]
    read = [result for result in results if 'error' not in result]
    lines = [f'Skipped: {_name(r)} {r["error"]}' for r in skipped[:_NAMED]]
    if len(skipped) > _NAMED:
        lines.append(f'... and {len(skipped) - _NAMED} more: see {RESULTS}.')
    if not results:
        lines.append('No pictures or videos found. Files are told by their suffix.')
    frames = sum('frame' in result for result in read)
    lines.append(
        f'Read {len(read) - frames} pictures and {frames} frames of videos, skipped '
        f'{len(skipped)} files.'
    )
    for key, kind, what in (
        ('drawn', 'drawn', 'Drawn'),
        ('label_map', 'label_maps', 'Label maps'),
    ):
        paths = {result[key] for result in read if key in result}
        if paths:
            lines.append(f'{what}: {len(paths)} files in {Path(folder) / kind}')
    return [*lines, f'Results: {Path(folder) / RESULTS}']


def _name(result: Dict[str, Any]) -> str:
    name = printable(result['input'], PATH_LIMIT)
    return f'{name}, frame {result["frame"]},' if 'frame' in result else name
