# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Masks of instances that are decoded as late as possible.

Importing this module needs mmdet.
"""

from typing import Any, NamedTuple, Optional, Sequence, Union

import cv2
import mmcv
import numpy as np
from mmdet.structures.mask import BitmapMasks
from pycocotools import mask as coco_mask


class _Annotation(NamedTuple):
    """A mask as COCO has it: polygons or run-length encoded, of an image's size."""

    mask: Union[list, dict]
    height: int
    width: int


class _Part(NamedTuple):
    """The box of a mask outside of which all is 0."""

    bitmap: np.ndarray
    top: int
    left: int


_NOTHING = _Part(np.empty((0, 0), np.uint8), 0, 0)


class _Later(NamedTuple):
    """What there is before bitmaps: masks, and which of their rows and columns."""

    parts: list  # each an _Annotation or a _Part
    rows: BitmapMasks
    columns: BitmapMasks


def _encode(annotation: _Annotation) -> dict:
    mask, height, width = annotation
    if isinstance(mask, list):
        return coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    if isinstance(mask['counts'], list):
        return coco_mask.frPyObjects(mask, height, width)
    return mask


def _decode(annotation: _Annotation) -> _Part:
    if isinstance(annotation.mask, list):
        # pycocotools writes a whole image. This one ends where the polygons do.
        points = np.concatenate(annotation.mask).reshape(-1, 2)
        sides = (points.max(axis=0).clip(min=-1) + 2).astype(int).tolist()
        width, height = map(min, sides, (annotation.width, annotation.height))
        annotation = annotation._replace(width=width, height=height)
    encoded = _encode(annotation)
    left, top, width, height = map(int, coco_mask.toBbox(encoded))
    bitmap = coco_mask.decode(encoded)[top : top + height, left : left + width]
    return _Part(bitmap, top, left)


def _gather(part: _Part, rows: np.ndarray, columns: np.ndarray) -> _Part:
    """A part of a mask whose rows and columns are given ones of the old mask."""
    rows, columns = rows - part.top, columns - part.left
    height, width = part.bitmap.shape
    # Neighbours stay neighbours, so what is inside is an interval.
    inside_rows = np.flatnonzero((rows >= 0) & (rows < height))
    inside_columns = np.flatnonzero((columns >= 0) & (columns < width))
    if not (inside_rows.size and inside_columns.size):
        return _NOTHING
    rows, columns = rows[inside_rows], columns[inside_columns]
    bitmap = part.bitmap
    if not (_is_range(rows, height) and _is_range(columns, width)):
        # Lines of memory are copied as a whole. They are columns after decoding.
        bitmap = bitmap.T.take(columns, axis=0)
        bitmap = cv2.transpose(bitmap).take(rows, axis=0)
    return _Part(bitmap, int(inside_rows[0]), int(inside_columns[0]))


def _is_range(index: np.ndarray, length: int) -> bool:
    return np.array_equal(index, np.arange(length))


def _index_masks(height: int, width: int) -> BitmapMasks:
    """Indices 0, 1, ... along a side of length 1 or more, byte by byte, as four masks.

    What mmdet does to masks of uint8 it then does to indices.
    """
    index = np.arange(height * width, dtype=np.int32)
    planes = index.view(np.uint8).reshape(-1, 4).T
    return BitmapMasks(planes.reshape(4, height, width), height, width)


def _index(masks: BitmapMasks) -> np.ndarray:
    """The indices of :func:`_index_masks`, after what was done to them."""
    return np.ascontiguousarray(masks.masks.reshape(4, -1).T).view(np.int32)[:, 0]


class InstanceMasks(BitmapMasks):
    """mmdet's masks, decoded when they are read.

    A training pipeline resizes masks, crops them, and leaves instances out. The value
    of each pixel then is that of one pixel in the annotation, in the row and column
    that mmdet computes for all instances alike. So this class keeps the annotations,
    and applies mmdet's methods to the numbers of the rows and of the columns.
    Reading :attr:`masks` decodes; every other method of mmdet does so, and then acts on
    bitmaps.

    Args:
        masks (ndarray | list[ndarray]): Bitmaps, as for ``BitmapMasks``. See
            :meth:`from_annotations` for others.
        height (int): Height in pixels.
        width (int): Width in pixels.
    """

    def __init__(self, masks: Any, height: int, width: int) -> None:
        self._later: Optional[_Later] = None
        if isinstance(masks, _Later) and masks.parts:
            self.height, self.width, self._later = height, width, masks
        else:
            super().__init__([] if isinstance(masks, _Later) else masks, height, width)

    @classmethod
    def from_annotations(
        cls, annotations: Sequence[Union[list, dict]], height: int, width: int
    ) -> 'InstanceMasks':
        """Masks of COCO's annotations.

        Args:
            annotations (Sequence[list | dict]): A list of polygons
                ``[x1, y1, x2, y2, ...]`` in pixels for each instance, or a run-length
                encoding.
            height (int): Height of the image in pixels.
            width (int): Width of the image in pixels.
        """
        masks = [_Annotation(mask, height, width) for mask in annotations]
        sizes = [mask['size'] for mask in annotations if isinstance(mask, dict)]
        if any(tuple(size) != (height, width) for size in sizes):
            # An encoding of another size: mmdet reads it so, or refuses it.
            decoded = [coco_mask.decode(_encode(mask)) for mask in masks]
            return cls(decoded, height, width)
        rows, columns = _index_masks(height, 1), _index_masks(1, width)
        return cls(_Later(masks, rows, columns), height, width)

    @property
    def masks(self) -> np.ndarray:
        """Bitmaps of shape (N, height, width) in uint8, or as they were given."""
        if self._later is not None:
            self.decode()
            bitmaps = np.zeros((len(self), self.height, self.width), np.uint8)
            for bitmap, (part, top, left) in zip(bitmaps, self._later.parts):
                height, width = part.shape
                bitmap[top : top + height, left : left + width] = part
            self.masks = bitmaps
        return self._bitmaps

    @masks.setter
    def masks(self, bitmaps: np.ndarray) -> None:
        self._bitmaps, self._later = bitmaps, None

    def decode(self) -> None:
        """Decode what is not yet, in the box of each mask; a few kilobytes for most.

        :attr:`masks` then only places the boxes.
        """
        if self._later is None:
            return
        rows, columns = _index(self._later.rows), _index(self._later.columns)
        parts = [
            _gather(
                _decode(part) if isinstance(part, _Annotation) else part, rows, columns
            )
            for part in self._later.parts
        ]
        self._later = _Later(
            parts, _index_masks(self.height, 1), _index_masks(1, self.width)
        )

    def __len__(self) -> int:
        return len(self._bitmaps if self._later is None else self._later.parts)

    def __getitem__(self, index) -> BitmapMasks:
        if self._later is None:
            return super().__getitem__(index)
        chosen = np.arange(len(self))[index].reshape(-1)
        parts = [self._later.parts[i] for i in chosen]
        return InstanceMasks(self._later._replace(parts=parts), self.height, self.width)

    def rescale(self, scale, interpolation: str = 'nearest') -> BitmapMasks:
        """See ``BitmapMasks.rescale``."""
        if self._later is None:
            return super().rescale(scale, interpolation)
        width, height = mmcv.rescale_size((self.width, self.height), scale)
        return self.resize((height, width), interpolation)

    def resize(self, out_shape, interpolation: str = 'nearest') -> BitmapMasks:
        """See ``BitmapMasks.resize``."""
        if self._later is None or interpolation != 'nearest':
            return super().resize(out_shape, interpolation)
        height, width = out_shape
        parts, rows, columns = self._later
        rows, columns = rows.resize((height, 1)), columns.resize((1, width))
        return InstanceMasks(_Later(parts, rows, columns), height, width)

    def flip(self, flip_direction: str = 'horizontal') -> BitmapMasks:
        """See ``BitmapMasks.flip``."""
        if self._later is None:
            return super().flip(flip_direction)
        parts, rows, columns = self._later
        rows, columns = rows.flip(flip_direction), columns.flip(flip_direction)
        return InstanceMasks(_Later(parts, rows, columns), self.height, self.width)

    def crop(self, bbox: np.ndarray) -> BitmapMasks:
        """See ``BitmapMasks.crop``."""
        if self._later is None:
            return super().crop(bbox)
        parts, rows, columns = self._later
        rows = rows.crop(bbox * (0, 1, 0, 1))
        columns = columns.crop(bbox * (1, 0, 1, 0))
        later = _Later(parts, rows, columns)
        return InstanceMasks(later, rows.height, columns.width)

    def pad(self, out_shape, pad_val: int = 0) -> BitmapMasks:
        """See ``BitmapMasks.pad``."""
        if self._later is None or pad_val != 0:
            return super().pad(out_shape, pad_val)
        height, width = out_shape
        parts, rows, columns = self._later
        # The number of an added row or column is -1: four bytes of 255.
        rows, columns = rows.pad((height, 1), 255), columns.pad((1, width), 255)
        return InstanceMasks(_Later(parts, rows, columns), height, width)

    @classmethod
    def cat(cls, masks: Sequence[BitmapMasks]) -> BitmapMasks:
        """See ``BitmapMasks.cat``. The masks may also be of mmdet's class."""
        return BitmapMasks.cat(masks)
