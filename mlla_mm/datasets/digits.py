# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real handwritten digits on photographs, in COCO, ADE20K and ImageNet layout.

COCO, ADE20K and ImageNet cannot be shipped. scikit-learn carries 1,797 handwritten
digits and two photographs, so a small data set that trains in minutes can be
composed anywhere, without a download, and read by the same dataset classes,
pipelines and metrics as the real ones.
"""

import colorsys
import importlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

import numpy as np
from mmengine.utils import track_iter_progress

# Their alphabetical order is their numerical order, which the folders of the
# ImageNet layout rely on.
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

# Raise it whenever the same arguments give other files than before.
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
    photos: list[np.ndarray]
    credits: str


class Scene(NamedTuple):
    """One composed image.

    Attributes:
        image (np.ndarray): RGB uint8, (H, W, 3).
        owner (np.ndarray): Which digit a pixel shows, int, (H, W): 0 is the
            background, k the k-th digit. A digit's visible mask is
            ``owner == k``, so masks never overlap.
        source_indices (list[int]): For each digit its index in
            ``sklearn.datasets.load_digits``.
    """

    image: np.ndarray
    owner: np.ndarray
    source_indices: list[int]


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
    return _make(out, 'coco', _write_coco, seed, train, val, size)


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
    return _make(out, 'ade20k', _write_ade20k, seed, train, val, size)


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
    return _make(out, 'imagenet', _write_imagenet, seed, train, val, size)


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


def split_digits(labels: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Split the digits so that none is in both training and validation.

    Args:
        labels (np.ndarray): Classes of the digits, int, (N, ).
        seed (int): Seed of the split. Defaults to 0.

    Returns:
        dict[str, np.ndarray]: Sorted indices under 'train' and 'val'; the latter
        has a fifth of every class.
    """
    # Images use [seed, 0 or 1, index], so this stream is nobody else's.
    rng = np.random.default_rng([seed, len(_SPLITS)])
    train, val = [], []
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_val = round(len(members) * VAL_FRACTION)
        val.append(members[:num_val])
        train.append(members[num_val:])
    return {
        'train': np.sort(np.concatenate(train)),
        'val': np.sort(np.concatenate(val)),
    }


def crop_photo(
    rng: np.random.Generator, photo: np.ndarray, split: str, size: int
) -> np.ndarray:
    """Crop a random square from the split's part of a photograph.

    Args:
        rng (np.random.Generator): Source of randomness.
        photo (np.ndarray): RGB uint8, (H, W, 3).
        split (str): 'train' crops left of ``PHOTO_SPLIT_COLUMN``, 'val' right of
            it.
        size (int): Height and width of the result in pixels.

    Returns:
        np.ndarray: RGB uint8, (size, size, 3).
    """
    cv2 = _require('cv2', 'opencv-python')
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
    """Lower contrast and brightness at random, so that bright digits stand out.

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
        side (int): Pixels which the 8x8 grid is to cover.

    Returns:
        np.ndarray: Opacity, float32 in [0, 1], (h, w), cut to the mask's tight box.
        The mask is where it exceeds 0.5.
    """
    cv2 = _require('cv2', 'opencv-python')
    # Ink touches the border of most glyphs: without a margin strokes end in a cut.
    padded = np.pad(glyph, 1)
    side = round(side * len(padded) / len(glyph))
    ink = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    opacity = np.clip((ink - INK_THRESHOLD) / 0.3 + 0.5, 0, 1)
    rows, columns = np.nonzero(opacity > 0.5)
    return opacity[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def compose_scene(
    source: Source,
    source_indices: list[int],
    rng: np.random.Generator,
    split: str,
    size: int,
    scale: tuple[float, float],
) -> Scene:
    """Put digits on a photograph, later ones in front of earlier ones.

    A digit for which no place is found that leaves ``MIN_VISIBLE`` of all others
    visible is left out; the first always has one.

    Args:
        source (Source): Digits and photographs.
        source_indices (list[int]): The digits to place.
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
    areas, placed = [0], []
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
    rng: np.random.Generator, owner: np.ndarray, areas: list[int], mask: np.ndarray
) -> Optional[tuple[slice, slice]]:
    """Slices at which ``mask`` leaves enough of every digit visible, or None."""
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
    return np.float32(colorsys.hsv_to_rgb(hue, saturation, value)) * 255


def _image_rng(seed: int, split: str, index: int) -> np.random.Generator:
    # One stream an image: it depends on neither the images before it nor their
    # number, so a smaller set is the beginning of a larger one.
    return np.random.default_rng([seed, _SPLITS.index(split), index])


def _scene(source, pool, split, index, seed, size) -> Scene:
    rng = _image_rng(seed, split, index)
    count = int(rng.integers(1, MAX_DIGITS + 1))
    chosen = pool[rng.integers(len(pool), size=count)]
    return compose_scene(source, chosen, rng, split, size, SCENE_SCALE)


def _progress(num_images: int) -> Iterable[int]:
    # In a log the bar would be a thousand lines.
    indices = range(num_images)
    return track_iter_progress(indices) if sys.stdout.isatty() else indices


def _write_coco(root, source, pool, split, seed, num_images, size) -> int:
    (root / split).mkdir()
    (root / 'annotations').mkdir(exist_ok=True)
    images, annotations = [], []
    for index in _progress(num_images):
        scene = _scene(source, pool, split, index, seed, size)
        name = f'{index:06d}.png'
        _write_png(root / split / name, scene.image)
        images.append(dict(id=index + 1, file_name=name, height=size, width=size))
        for position, source_index in enumerate(scene.source_indices, 1):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=int(source.labels[source_index]) + 1,
                    source_index=source_index,
                    iscrowd=0,
                    **_coco_shape(scene.owner == position),
                )
            )
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    _write_json(
        root / 'annotations' / f'instances_{split}.json',
        dict(
            info=dict(description=f'mlla_mm digits, {split}', version=str(VERSION)),
            licenses=[],
            images=images,
            annotations=annotations,
            categories=categories,
        ),
    )
    return len(annotations)


def _coco_shape(mask: np.ndarray) -> dict:
    """COCO's ``segmentation``, ``area`` and ``bbox`` (x, y, w, h) of a mask."""
    coco_mask = _require('pycocotools.mask', 'pycocotools')
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    rle['counts'] = rle['counts'].decode()
    rows, columns = np.nonzero(mask)
    x, y = int(columns.min()), int(rows.min())
    width, height = int(columns.max()) + 1 - x, int(rows.max()) + 1 - y
    return dict(segmentation=rle, area=len(rows), bbox=[x, y, width, height])


def _write_ade20k(root, source, pool, split, seed, num_images, size) -> int:
    folder = {'train': 'training', 'val': 'validation'}[split]
    (root / 'images' / folder).mkdir(parents=True)
    (root / 'annotations' / folder).mkdir(parents=True)
    num_digits = 0
    for index in _progress(num_images):
        scene = _scene(source, pool, split, index, seed, size)
        labels = [1, *(source.labels[scene.source_indices] + 2)]
        name = f'{index:06d}.png'
        _write_png(root / 'images' / folder / name, scene.image)
        _write_png(root / 'annotations' / folder / name, np.uint8(labels)[scene.owner])
        num_digits += len(scene.source_indices)
    return num_digits


def _write_imagenet(root, source, pool, split, seed, num_images, size) -> int:
    (root / 'meta').mkdir(exist_ok=True)
    for name in CLASSES:
        (root / split / name).mkdir(parents=True)
    members = [pool[source.labels[pool] == i] for i in range(len(CLASSES))]
    lines = []
    for index in _progress(num_images):
        # Classes take turns, and all digits of a class come before any repeats.
        turn, label = divmod(index, len(CLASSES))
        source_index = int(members[label][turn % len(members[label])])
        scene = compose_scene(
            source,
            [source_index],
            _image_rng(seed, split, index),
            split,
            size,
            SINGLE_SCALE,
        )
        name = f'{CLASSES[label]}/{index:06d}_{source_index:04d}.png'
        _write_png(root / split / name, scene.image)
        lines.append(f'{name} {label}\n')
    (root / 'meta' / f'{split}.txt').write_text(''.join(lines))
    return num_images


def _make(
    out: Union[str, Path],
    layout: str,
    write: Callable,
    seed: int,
    train: int,
    val: int,
    size: int,
) -> Path:
    arguments = dict(
        version=VERSION, layout=layout, seed=seed, train=train, val=val, size=size
    )
    _check_arguments(arguments)
    # Resolved, because a link cannot be replaced by the rename below.
    out = Path(out).expanduser().resolve()
    if _is_made(out, arguments):
        return out

    source = load_source()
    pools = split_digits(source.labels, seed)
    building = out.with_name(f'{out.name}.tmp-{uuid.uuid4().hex[:8]}')
    building.mkdir(parents=True)
    try:
        num_digits = {
            split: write(
                building, source, pools[split], split, seed, arguments[split], size
            )
            for split in _SPLITS
        }
        readme = _readme(arguments, num_digits, pools, source.credits)
        (building / 'README.md').write_text(readme, encoding='utf-8')
        _write_json(building / 'digits.json', arguments)
        _publish(building, out, arguments)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def _check_arguments(arguments: dict) -> None:
    for name, least in dict(seed=0, train=1, val=1, size=MIN_SIZE).items():
        value = arguments[name]
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f'{name} must be a whole number of at least {least}, but got {value!r}.'
            )


def _is_made(out: Path, arguments: dict) -> bool:
    """Whether ``out`` is this data set already; False if there is room for it."""
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


def _publish(building: Path, out: Path, arguments: dict) -> None:
    """Rename the finished folder; the first of several processes wins."""
    try:
        building.replace(out)
    except OSError:
        if not _is_made(out, arguments):
            raise


def _write_png(path: Path, image: np.ndarray) -> None:
    cv2 = _require('cv2', 'opencv-python')
    # OpenCV's channel order is BGR.
    _, data = cv2.imencode('.png', image[..., ::-1] if image.ndim == 3 else image)
    path.write_bytes(data.tobytes())


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def _require(module: str, package: str):
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


def _readme(arguments: dict, num_digits: dict, pools: dict, credits: str) -> str:
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
