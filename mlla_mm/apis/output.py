# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Files that inference writes: drawn pictures and videos, label maps, results."""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import cv2
import numpy as np
from mmengine.fileio import dump

from ..utils.files import write_whole
from ..utils.text import PATH_LIMIT, printable
from .inputs import Picture, Source, fps, is_utf8

RESULTS = 'results.json'
# Skipped files that a summary names.
_NAMED = 10


class Output:
    """The folder that inference writes into; a context manager.

    Args:
        folder (str | Path): It is made if it does not exist. Files of the same names
            are replaced.
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self.folder = Path(folder)
        self._video: Optional[cv2.VideoWriter] = None
        self._source: Optional[Source] = None

    def __enter__(self) -> 'Output':
        self.folder.mkdir(parents=True, exist_ok=True)
        results = self.folder / RESULTS
        if results.is_dir():
            raise ValueError(
                f'{results} is a folder, and the results are to be written there. '
                'Remove it, or choose another output folder.'
            )
        return self

    def __exit__(self, *error: Any) -> None:
        self._close_video()

    def write_drawn(self, picture: Picture, drawn: np.ndarray) -> str:
        """Write a drawn picture, or a frame behind those of the same video.

        Args:
            picture (Picture): What it was drawn on.
            drawn (np.ndarray): RGB, (H, W, 3).

        Returns:
            str: The picture's or the video's path.
        """
        image = np.ascontiguousarray(drawn[..., ::-1])
        if picture.frame is None:
            return self._write(image, 'drawn', picture, '.jpg')
        if picture.source is not self._source:
            self._close_video()
            self._video_path = self._place('drawn', f'{picture.source.name}.mp4')
            self._video = _open_writer(self._video_path, fps(picture.source), image)
            self._source = picture.source
        self._video.write(image)
        return str(self._video_path)

    def write_label_map(self, picture: Picture, labels: np.ndarray) -> str:
        """Write the labels of all pixels (H, W) as a PNG file; returns its path."""
        return self._write(labels, 'label_maps', picture, '.png')

    def write_results(self, results: List[Dict[str, Any]]) -> None:
        text = dump(results, file_format='json')
        write_whole(self.folder / RESULTS, text.encode())

    def _write(
        self, image: np.ndarray, kind: str, picture: Picture, suffix: str
    ) -> str:
        name = picture.source.name
        if picture.frame is not None:
            name = f'{name}/{picture.frame:06d}'
        # Not imwrite(), which looks for the suffix in the name.
        encoded, content = cv2.imencode(suffix, image)
        if not encoded:
            height, width = image.shape[:2]
            raise ValueError(f'{width} x {height} pixels do not fit into a {suffix}')
        # Not with_suffix(): a dot of the name is no suffix.
        path = self._place(kind, f'{name}{suffix}')
        path.write_bytes(content.tobytes())
        return str(path)

    def _place(self, kind: str, name: str) -> Path:
        """Where to write a file: through no link that was in the folder before."""
        path = self.folder / kind / name
        root = os.path.realpath(self.folder)
        if os.path.commonpath([root, os.path.realpath(path.parent)]) != root:
            raise OSError(f'{printable(path.parent, PATH_LIMIT)} leads out of {root}')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return path

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.release()
        self._video = self._source = None


def _open_writer(path: Path, rate: float, image: np.ndarray) -> cv2.VideoWriter:
    height, width = image.shape[:2]
    codec = cv2.VideoWriter_fourcc(*'mp4v')
    # Absolute, or FFmpeg would take 'pipe:.mp4' for an address.
    name = os.path.abspath(path)
    if not is_utf8(name):
        raise ValueError('OpenCV writes no video whose path is not UTF-8')
    writer = cv2.VideoWriter(name, codec, rate, (width, height))
    if not writer.isOpened():
        raise OSError(f'OpenCV cannot write the video {path}.')
    return writer


def summary(results: List[Dict[str, Any]], folder: Union[str, Path]) -> List[str]:
    """Say what was written, and which inputs were skipped and why.

    Names of files are escaped where they would move a terminal's cursor.

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
        lines.append('No pictures or videos found: files count by their suffix.')
    frames = sum('frame' in result for result in read)
    lines.append(
        f'Read {len(read) - frames} pictures and {frames} frames of videos, skipped '
        f'{len(skipped)} files.'
    )
    for key, what in (('drawn', 'Drawn'), ('label_map', 'Label maps')):
        paths = {result[key] for result in read if key in result}
        if paths:
            kind = Path(folder) / ('drawn' if key == 'drawn' else 'label_maps')
            lines.append(f'{what}: {len(paths)} files in {kind}')
    return [*lines, f'Results: {Path(folder) / RESULTS}']


def _name(result: Dict[str, Any]) -> str:
    name = printable(result['input'], PATH_LIMIT)
    return f'{name}, frame {result["frame"]},' if 'frame' in result else name
