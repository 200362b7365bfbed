# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real handwritten digits on photographs, in the format of COCO, ADE20K and ImageNet.

COCO, ADE20K and ImageNet cannot be shipped. scikit-learn has 1,797 handwritten digits
and two photographs. They make a small data set anywhere, without a download, which
trains in minutes and is read by the same data set classes, pipelines and metrics.
"""

import colorsys
import importlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import cv2
import numpy as np
from rich.progress import track

# ImageNet's class folders are numbered in alphabetical order.
CLASSES = tuple('0123456789')
PALETTE = [
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
]
SEG_CLASSES = ('background', *CLASSES)
SEG_PALETTE = [(120, 120, 120), *PALETTE]

# To be raised whenever the same arguments give other files than before.
VERSION = 1

MIN_SIZE = 32
VAL_FRACTION = 0.2
# Photographs are 640 columns wide: training crops lie left of this one.
PHOTO_SPLIT_COLUMN = 448
MAX_DIGITS = 5
# Higher breaks strokes, lower fills the holes of 4, 8 and 9.
INK_THRESHOLD = 0.45
MIN_VISIBLE = 0.85
SCENE_SCALE = (0.25, 0.45)
SINGLE_SCALE = (0.5, 0.85)

_SPLITS = ('train', 'val')
_PLACEMENT_TRIALS = 20


class Source(NamedTuple):
    """What the images are made of.

    Attributes:
        glyphs (np.ndarray): Ink of the digits, float32 in [0, 1], (1797, 8, 8).
        labels (np.ndarray): Their classes, int, (1797, ).
        photos (list[np.ndarray]): Photographs, RGB uint8, (427, 640, 3) each.
        credits (str): Who made the photographs, under which licence.
    """

    glyphs: np.ndarray
    labels: np.ndarray
    photos: List[np.ndarray]
    credits: str


class Scene(NamedTuple):
    """One composed image.

    Attributes:
        image (np.ndarray): RGB uint8, (H, W, 3).
        owner (np.ndarray): The digit that each pixel shows, int, (H, W): 0 is the
            background, k the k-th digit. The visible mask of a digit is
            ``owner == k``, so masks never overlap.
        source_indices (list[int]): For each digit its index in
            ``sklearn.datasets.load_digits``.
    """

    image: np.ndarray
    owner: np.ndarray
    source_indices: List[int]


def make_coco(
    out: Union[str, Path],
    seed: int = 0,
    train: int = 1000,
    val: int = 200,
    size: int = 128,
) -> Path:
    """Write 1 to 5 digits an image with COCO instance annotations.

    Files: ``{train,val}/*.png`` and ``annotations/instances_{train,val}.json``.
    An annotation's ``source_index`` is the digit's index in
    ``sklearn.datasets.load_digits``.

    Args:
        out (str | Path): The folder to make. A complete folder made with the same
            arguments is kept as it is.
        seed (int): Seed of the digit split and of every image. Defaults to 0.
        train (int): Number of training images. Defaults to 1000.
        val (int): Number of validation images. Defaults to 200.
        size (int): Height and width in pixels. Defaults to 128.

    Returns:
        Path: The folder, absolute.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``out`` holds something else.
    """
    return _make(out, 'coco', seed=seed, train=train, val=val, size=size)


def make_ade20k(
    out: Union[str, Path],
    seed: int = 0,
    train: int = 1000,
    val: int = 200,
    size: int = 128,
) -> Path:
    """Write the images of :func:`make_coco` with ADE20K label maps.

    Files: ``{images,annotations}/{training,validation}/*.png``. Label maps are
    uint8 and follow ADE20K: 0 is unlabelled (unused here), 1 the background and
    2 to 11 the digits, so ``reduce_zero_label=True`` gives indices into
    ``SEG_CLASSES``.

    Args:
        out (str | Path): The folder to make. A complete folder made with the same
            arguments is kept as it is.
        seed (int): Seed of the digit split and of every image. Defaults to 0.
        train (int): Number of training images. Defaults to 1000.
        val (int): Number of validation images. Defaults to 200.
        size (int): Height and width in pixels. Defaults to 128.

    Returns:
        Path: The folder, absolute.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``out`` holds something else.
    """
    return _make(out, 'ade20k', seed=seed, train=train, val=val, size=size)


def make_imagenet(
    out: Union[str, Path],
    seed: int = 0,
    train: int = 1000,
    val: int = 200,
    size: int = 64,
) -> Path:
    """Write one digit an image in ImageNet's class folders.

    Files: ``{train,val}/CLASS/INDEX_SOURCE.png``, where SOURCE is the digit's index
    in ``sklearn.datasets.load_digits``, and ``meta/{train,val}.txt`` with
    ``CLASS/NAME.png LABEL`` lines. Classes are balanced.

    Args:
        out (str | Path): The folder to make. A complete folder made with the same
            arguments is kept as it is.
        seed (int): Seed of the digit split and of every image. Defaults to 0.
        train (int): Number of training images. Defaults to 1000.
        val (int): Number of validation images. Defaults to 200.
        size (int): Height and width in pixels. Defaults to 64.

    Returns:
        Path: The folder, absolute.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``out`` holds something else.
    """
    return _make(out, 'imagenet', seed=seed, train=train, val=val, size=size)


def load_source() -> Source:
    """Load the digits and photographs that come with scikit-learn.

    Returns:
        Source: Digits, their classes, the photographs and their credits.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    datasets = _require('sklearn.datasets', 'scikit-learn')
    digits = datasets.load_digits()
    photos = datasets.load_sample_images()
    return Source(
        glyphs=(digits.images / 16).astype(np.float32),
        labels=digits.target,
        photos=photos.images,
        credits=photos.DESCR.strip(),
    )


def split_digits(labels: np.ndarray, seed: int = 0) -> Dict[str, np.ndarray]:
    """Split the digits so that none is in both training and validation.

    Args:
        labels (np.ndarray): Classes of the digits, int, (N, ).
        seed (int): Seed of the split. Defaults to 0.

    Returns:
        dict[str, np.ndarray]: Sorted indices under 'train' and 'val'. Validation has a
        fifth of every class.
    """
    # The images have other keys: see _make.
    rng = np.random.default_rng([seed, len(_SPLITS)])
    train, val = [], []
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_val = round(len(members) * VAL_FRACTION)
        val.append(members[:num_val])
        train.append(members[num_val:])
    return dict(train=np.sort(np.concatenate(train)), val=np.sort(np.concatenate(val)))


def crop_photo(
    rng: np.random.Generator, photo: np.ndarray, split: str, size: int
) -> np.ndarray:
    """Crop a random square from the split's part of a photograph.

    Args:
        rng (np.random.Generator): Source of randomness.
        photo (np.ndarray): RGB uint8, (H, W, 3).
        split (str): 'train' crops left of ``PHOTO_SPLIT_COLUMN``, 'val' right of it.
        size (int): Height and width of the result in pixels.

    Returns:
        np.ndarray: RGB uint8, (size, size, 3).
    """
    height, width = photo.shape[:2]
    left, right = (
        (0, PHOTO_SPLIT_COLUMN) if split == 'train' else (PHOTO_SPLIT_COLUMN, width)
    )
    longest = width - PHOTO_SPLIT_COLUMN
    side = int(rng.integers(longest // 2, longest + 1))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(0, height - side + 1))
    crop = np.ascontiguousarray(photo[y : y + side, x : x + side])
    method = cv2.INTER_AREA if size < side else cv2.INTER_LINEAR
    return cv2.resize(crop, (size, size), interpolation=method)


def dim_photo(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Lower contrast and brightness at random, so that digits are brighter.

    Args:
        rng (np.random.Generator): Source of randomness.
        image (np.ndarray): RGB uint8, (H, W, 3).

    Returns:
        np.ndarray: RGB float32 in [0, 255], (H, W, 3).
    """
    contrast, brightness = rng.uniform(0.5, 1.0), rng.uniform(0.25, 0.6)
    image = image.astype(np.float32)
    mean = image.mean()
    return (mean + contrast * (image - mean)) * np.float32(brightness)


def enlarge_glyph(glyph: np.ndarray, side: int) -> np.ndarray:
    """Enlarge a digit with bicubic interpolation and sharpen its edge.

    Args:
        glyph (np.ndarray): Ink, float32 in [0, 1], (8, 8).
        side (int): Height and width of the enlarged 8x8 grid in pixels.

    Returns:
        np.ndarray: Opacity, float32 in [0, 1], (h, w), cut to the tight box of the
        digit's mask. The mask is where the opacity exceeds 0.5.
    """
    # Ink touches the border of most glyphs: strokes would be cut without a margin.
    padded = np.pad(glyph, 1)
    side = round(side * len(padded) / len(glyph))
    ink = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    opacity = np.clip((ink - INK_THRESHOLD) / 0.3 + 0.5, 0, 1)
    rows, columns = np.nonzero(opacity > 0.5)
    return opacity[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def compose_scene(
    source: Source,
    source_indices: Sequence[int],
    rng: np.random.Generator,
    split: str,
    size: int,
    scale: Tuple[float, float],
) -> Scene:
    """Put digits on a photograph, later ones in front of earlier ones.

    Each digit needs a place where ``MIN_VISIBLE`` of every other digit stays visible.
    It is left out if none is found. The first digit always has a place.

    Args:
        source (Source): Digits and photographs.
        source_indices (list[int]): Indices of the digits to place.
        rng (np.random.Generator): Source of randomness.
        split (str): 'train' or 'val', for the background.
        size (int): Height and width in pixels.
        scale (tuple[float, float]): Smallest and largest height of the 8x8 grid as
            a fraction of ``size``.

    Returns:
        Scene: Image, pixel owners and the digits that were placed.
    """
    photo = source.photos[rng.integers(len(source.photos))]
    image = dim_photo(rng, crop_photo(rng, photo, split, size))
    owner = np.zeros((size, size), np.int64)
    areas: List[int] = [0]
    placed: List[int] = []
    for source_index in source_indices:
        side = round(rng.uniform(*scale) * size)
        opacity = enlarge_glyph(source.glyphs[source_index], side)
        window = _find_place(rng, owner, areas, opacity > 0.5)
        color = _bright_color(rng)
        if window is None:
            continue
        placed.append(int(source_index))
        areas.append(int((opacity > 0.5).sum()))
        owner[window][opacity > 0.5] = len(placed)
        image[window] += opacity[..., None] * (color - image[window])
    return Scene(np.rint(image).astype(np.uint8), owner, placed)


def _find_place(
    rng: np.random.Generator, owner: np.ndarray, areas: List[int], mask: np.ndarray
) -> Optional[Tuple[slice, slice]]:
    """Slices where ``mask`` leaves enough of every digit visible, or None."""
    height, width = mask.shape
    visible = np.bincount(owner.ravel(), minlength=len(areas))
    for _ in range(_PLACEMENT_TRIALS):
        y = int(rng.integers(owner.shape[0] - height + 1))
        x = int(rng.integers(owner.shape[1] - width + 1))
        window = (slice(y, y + height), slice(x, x + width))
        hidden = np.bincount(owner[window][mask], minlength=len(areas))
        left = (visible - hidden)[1:]
        if (left >= MIN_VISIBLE * np.asarray(areas[1:])).all():
            return window
    return None


def _bright_color(rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = rng.uniform([0, 0, 0.85], [1, 0.65, 1])
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255


def _several_digits(
    rng: np.random.Generator, index: int, pool: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    count = int(rng.integers(1, MAX_DIGITS + 1))
    return pool[rng.integers(len(pool), size=count)]


def _one_digit(
    rng: np.random.Generator, index: int, pool: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Classes take turns. All digits of a class come before a digit repeats."""
    turn, label = divmod(index, len(CLASSES))
    members = pool[labels[pool] == label]
    return members[[turn % len(members)]]


def _write_coco(
    root: Path, split: str, scenes: Iterable[Scene], labels: np.ndarray
) -> None:
    (root / split).mkdir()
    (root / 'annotations').mkdir(exist_ok=True)
    images: List[dict] = []
    annotations: List[dict] = []
    for i, scene in enumerate(scenes, 1):
        name = f'{i - 1:06d}.png'
        _write_png(root / split / name, scene.image)
        height, width = scene.owner.shape
        images.append(dict(id=i, file_name=name, height=height, width=width))
        for position, source_index in enumerate(scene.source_indices, 1):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=int(labels[source_index]) + 1,
                    source_index=source_index,
                    iscrowd=0,
                    **_coco_shape(scene.owner == position),
                )
            )
    content = dict(
        info=dict(description=f'mlla_mm digits, {split}', version=str(VERSION)),
        licenses=[],
        images=images,
        annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)],
    )
    path = root / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(content))


def _coco_shape(mask: np.ndarray) -> Dict[str, Any]:
    """COCO's ``segmentation``, ``area`` and ``bbox`` (x, y, w, h) of a mask."""
    coco_mask = _require('pycocotools.mask', 'pycocotools')
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    shape = dict(area=int(coco_mask.area(rle)), bbox=[*map(int, coco_mask.toBbox(rle))])
    return dict(segmentation=dict(rle, counts=rle['counts'].decode()), **shape)


def _write_ade20k(
    root: Path, split: str, scenes: Iterable[Scene], labels: np.ndarray
) -> None:
    folder = {'train': 'training', 'val': 'validation'}[split]
    for kind in ('images', 'annotations'):
        (root / kind / folder).mkdir(parents=True)
    for index, scene in enumerate(scenes):
        name = f'{index:06d}.png'
        # 1 is the background.
        values = np.array([1, *(labels[scene.source_indices] + 2)], np.uint8)
        _write_png(root / 'images' / folder / name, scene.image)
        _write_png(root / 'annotations' / folder / name, values[scene.owner])


def _write_imagenet(
    root: Path, split: str, scenes: Iterable[Scene], labels: np.ndarray
) -> None:
    for name in CLASSES:
        (root / split / name).mkdir(parents=True)
    lines = []
    for index, scene in enumerate(scenes):
        (source_index,) = scene.source_indices
        label = labels[source_index]
        name = f'{CLASSES[label]}/{index:06d}_{source_index:04d}.png'
        _write_png(root / split / name, scene.image)
        lines.append(f'{name} {label}\n')
    (root / 'meta').mkdir(exist_ok=True)
    (root / 'meta' / f'{split}.txt').write_text(''.join(lines))


# How a layout is written, and the digits of an image: which, and how large.
_LAYOUTS: Dict[str, Tuple[Callable, Callable, Tuple[float, float]]] = {
    'coco': (_write_coco, _several_digits, SCENE_SCALE),
    'ade20k': (_write_ade20k, _several_digits, SCENE_SCALE),
    'imagenet': (_write_imagenet, _one_digit, SINGLE_SCALE),
}


def _make(out: Union[str, Path], layout: str, **numbers: int) -> Path:
    """Make a data set in a folder beside ``out``, which is renamed at the end."""
    for name, least in dict(seed=0, train=1, val=1, size=MIN_SIZE).items():
        value = numbers[name]
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f'{name} must be a whole number of at least {least}, but got {value!r}.'
            )
    arguments = dict(version=VERSION, layout=layout, **numbers)
    # Resolved, because renaming cannot replace a link.
    out = Path(out).expanduser().resolve()
    if _is_made(out, arguments):
        return out
    source = load_source()
    pools = split_digits(source.labels, numbers['seed'])
    write, choose, scale = _LAYOUTS[layout]
    num_digits = dict.fromkeys(_SPLITS, 0)

    def scenes(split: str) -> Iterator[Scene]:
        indices = range(numbers[split])
        silent = not sys.stdout.isatty()
        for index in track(indices, f'Writing {split}', disable=silent):
            # An image depends on neither the other images nor their number, so a
            # smaller set is the beginning of a larger one.
            key = [numbers['seed'], _SPLITS.index(split), index]
            rng = np.random.default_rng(key)
            digits = choose(rng, index, pools[split], source.labels)
            scene = compose_scene(source, digits, rng, split, numbers['size'], scale)
            num_digits[split] += len(scene.source_indices)
            yield scene

    building = out.with_name(f'{out.name}.tmp-{uuid.uuid4().hex[:8]}')
    building.mkdir(parents=True)
    try:
        for split in _SPLITS:
            write(building, split, scenes(split), source.labels)
        readme = _readme(arguments, num_digits, pools, source.credits)
        (building / 'README.md').write_text(readme, encoding='utf-8')
        (building / 'digits.json').write_text(json.dumps(arguments))
        building.replace(out)
    except OSError:
        # The first of several processes wins.
        if not _is_made(out, arguments):
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def _is_made(out: Path, arguments: Dict[str, Any]) -> bool:
    """Whether ``out`` is this data set already; False if the folder is empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        existing = json.loads((out / 'digits.json').read_text())
    except (OSError, ValueError):
        existing = 'something other than a digits data set'
    if existing == arguments:
        return True
    raise FileExistsError(
        f'{out} holds {existing}, but {arguments} is asked for. Remove it or choose '
        'another folder.'
    )


def _write_png(path: Path, image: np.ndarray) -> None:
    # OpenCV's channel order is BGR.
    _, data = cv2.imencode('.png', image[..., ::-1] if image.ndim == 3 else image)
    path.write_bytes(data.tobytes())


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'The digits data needs {package} ({error}): `pip install {package}`.'
        ) from error


_HOW_TO_READ = {
    'coco': (
        "mmdet's `CocoDataset` with `ann_file='annotations/instances_train.json'`, "
        "`data_prefix=dict(img='train/')` and `metainfo=dict(classes=CLASSES)`"
    ),
    'ade20k': (
        "mmseg's `BaseSegDataset` with `data_prefix=dict(img_path='images/training', "
        "seg_map_path='annotations/training')`, `img_suffix='.png'`, "
        '`reduce_zero_label=True` and `metainfo=dict(classes=SEG_CLASSES, '
        'palette=SEG_PALETTE)`'
    ),
    'imagenet': (
        "mmpretrain's `ImageNet` with `split='train'` and "
        '`metainfo=dict(classes=CLASSES)`'
    ),
}


def _readme(
    arguments: Dict[str, Any],
    num_digits: Dict[str, int],
    pools: Dict[str, np.ndarray],
    credits: str,
) -> str:
    layout, size = arguments['layout'], arguments['size']
    rows = '\n'.join(
        f'| {split} | {arguments[split]} | {num_digits[split]} | {len(pools[split])} |'
        for split in _SPLITS
    )
    quoted = '\n'.join(f'> {line}'.rstrip() for line in credits.splitlines())
    return f"""# Digits in {layout} layout

Handwritten digits on photographs, {size}x{size} pixels, made by
`mlla_mm.datasets.digits.make_{layout}` (version {VERSION}, seed {arguments['seed']}).

| split | images | digits shown | different digits to choose from |
| --- | --- | --- | --- |
{rows}

Read it with {_HOW_TO_READ[layout]}; the constants are in `mlla_mm.datasets.digits`.

## How it was made

Every background is a random square crop of one of two photographs, with lower
contrast and brightness. Digits of 8x8 pixels and 17 grey levels are enlarged with
bicubic interpolation and painted in a random bright colour; the mask is where the
opacity exceeds one half. Later digits hide parts of earlier ones, at most
{1 - MIN_VISIBLE:.0%} of each, and annotations cover what is visible. Training and
validation share no digit; training crops lie left of column {PHOTO_SPLIT_COLUMN} of
the photographs, validation crops right of it.

## Where it comes from

**Digits**: the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin
and C. Kaynak, UCI Machine Learning Repository, 1998
(https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits),
licensed under CC BY 4.0, as shipped with scikit-learn (`load_digits`). Changed as
described above.

**Photographs**: shipped with scikit-learn (`load_sample_images`), whose description
says:

{quoted}
"""
