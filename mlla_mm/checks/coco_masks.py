# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Masks of COCO's format: polygons and run-length encoding (RLE)."""

import math
from typing import Any, List, Optional

FLAT = 'a mask that is no list of polygons'
# What mmdet leaves out of a training, and pycocotools cannot evaluate.
NO_POLYGON = 'no polygon of at least three points'
INCOMPLETE = 'a run-length encoding without size or counts'
# mmdet trains on the other polygons. Of the first one pycocotools reads the format.
BAD_FIRST = 'a first polygon of fewer than three points, or of half a point'
BAD_LATER = 'a later polygon of fewer than three points, or of half a point'

# pycocotools takes memory for each pixel along an edge.
_FAR = 1e6


def mask_problem(mask: Any, width: float, height: float) -> str:
    """What is wrong with a ``segmentation``.

    Args:
        mask (Any): A list of polygons, or a dict with a run-length encoding.
        width (float): Width of the image, in pixels.
        height (float): Height of the image, in pixels.

    Returns:
        str: The kind of mistake; '' if there is none.
    """
    if not mask:
        return 'no mask'
    if isinstance(mask, dict):
        return _rle_problem(mask, width, height)
    if not isinstance(mask, list):
        return 'a mask that is neither polygons nor a run-length encoding'
    if not isinstance(mask[0], list):
        return FLAT
    if not all(map(_are_coordinates, mask)):
        return 'a polygon that is no list of coordinates'
    usable = [len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask]
    if all(usable):
        return ''
    if not any(usable):
        return NO_POLYGON
    return BAD_LATER if usable[0] else BAD_FIRST


def repaired_mask(mask: Any, width: float, height: float) -> Any:
    """The usable part of a ``segmentation``; None if there is none.

    A polygon that is not in a list is put into one. Polygons that cannot be one are
    left out. The arguments are those of :func:`mask_problem`.
    """
    if isinstance(mask, list):
        if mask and not any(isinstance(x, list) for x in mask):
            mask = [mask]
        mask = [x for x in mask if not mask_problem([x], width, height)]
    return None if mask_problem(mask, width, height) else mask


def mask_area(mask: Any, width: float, height: float) -> float:
    """Number of pixels of a mask that has no problem."""
    from pycocotools import mask as coco_mask

    if not isinstance(mask, dict):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, int(height), int(width)))
    elif isinstance(mask['counts'], list):
        mask = coco_mask.frPyObjects(mask, int(height), int(width))
    return float(coco_mask.area(mask))


def _are_coordinates(polygon: Any) -> bool:
    try:
        # The sum is not finite if a number is not. It is an error if one is no number.
        return polygon == [] or (
            isinstance(polygon, list)
            and math.isfinite(sum(polygon))
            and -_FAR < min(polygon)
            and max(polygon) < _FAR
        )
    except (TypeError, ValueError, OverflowError):
        return False


def _rle_problem(rle: dict, width: float, height: float) -> str:
    size, counts = rle.get('size'), rle.get('counts')
    if size is None or not isinstance(counts, (list, str)):
        return INCOMPLETE
    if size != [height, width]:
        return 'a run-length encoding of another size than [height, width] of its image'
    runs = counts if isinstance(counts, list) else _decode_counts(counts)
    try:
        # pycocotools would read beyond the end.
        fits = runs and min(runs) >= 0 and sum(runs) == height * width
    except TypeError:
        fits = False
    return '' if fits else 'a run-length encoding whose counts are not all pixels'


def _decode_counts(counts: str) -> Optional[List[int]]:
    """Lengths of runs from COCO's compressed text; None if it is cut off.

    A character has five bits of a number, lowest first, and a bit that says whether
    more follow. From the fourth on, a number is the difference to the last but one.
    """
    runs: List[int] = []
    number = shift = 0
    for code in map(ord, counts):
        code -= 48
        number |= (code & 31) << shift
        shift += 5
        if not 0 <= code < 64 or shift > 60:
            return None
        if not code & 32:
            if code & 16:
                number -= 1 << shift
            if len(runs) > 2:
                number += runs[-2]
            runs.append(number)
            number = shift = 0
    return None if shift else runs
