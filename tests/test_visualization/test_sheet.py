# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import itertools

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox

from mlla_mm.visualization.sheet import (
    add_legend,
    class_colors,
    draw_classes,
    draw_instances,
    new_sheet,
    save_sheet,
    show,
    spread,
)

RED, NAVY = (1, 0, 0), (0, 0, 0.5)


def draw(tmp_path, boxes, texts, colors=None, masks=None):
    """Axes and the labels' extents on a picture of 60 rows and 100 columns."""
    figure, [[ax]] = new_sheet(1, ['boxes'])
    show(ax, np.zeros((60, 100, 3), np.uint8))
    draw_instances(ax, boxes, texts, colors or [RED] * len(boxes), masks)
    save_sheet(figure, tmp_path / 'sheet.png')
    assert [text.get_text() for text in ax.texts] == texts
    return ax, [text.get_bbox_patch().get_window_extent() for text in ax.texts]


def test_panels(tmp_path, figures):
    figure, axes = new_sheet(3, ('image', 'prediction'), 'mIoU 51.9')
    assert axes.shape == (3, 2)
    for i, ax in enumerate(axes.flat):
        show(ax, np.full((8, 8, 3), 10 * i, np.uint8))
    save_sheet(figure, tmp_path / 'sheet.png')
    assert figures == [figure]
    assert figure.get_suptitle() == 'mIoU 51.9'
    left, top = np.array([ax.get_window_extent().p0 for ax in axes.flat]).T
    # A sample's panels stand side by side, two samples in a row.
    assert (np.diff(left[:4]) > 0).all() and np.ptp(top[:4]) < 1
    assert top[4] < top[0] and left[4] == pytest.approx(left[0])
    # Titles stand over the columns, once.
    titles = [ax.get_title() for ax in axes.flat]
    assert titles == ['image', 'prediction', 'image', 'prediction', '', '']


@pytest.mark.parametrize(
    'box', [(0, 0, 9, 9), (91, 0, 100, 9), (0, 51, 9, 60), (91, 51, 100, 60)]
)
def test_labels_at_corners_stay_in_the_picture(tmp_path, box):
    ax, [label] = draw(tmp_path, [box], ['person 0.98'])
    space = ax.get_window_extent()
    assert space.x0 - 1 <= label.x0 < label.x1 <= space.x1 + 1
    assert space.y0 - 1 <= label.y0 < label.y1 <= space.y1 + 1
    # It still touches its box.
    corners = ax.patches[0].get_window_extent()
    assert Bbox.intersection(label, corners.padded(1)) is not None


def test_labels_hide_no_other(tmp_path):
    """Four detections of one object, and a neighbour under their usual place."""
    boxes = [(30, 20, 60, 45), (31, 21, 60, 45), (30, 20, 61, 44), (29, 20, 60, 45)]
    _, labels = draw(tmp_path, [*boxes, (30, 22, 50, 40)], [*'abcd', 'e'])
    for one, other in itertools.combinations(labels, 2):
        common = Bbox.intersection(one, other)
        assert common is None or common.width * common.height < 1


def test_label_stands_above_its_box(tmp_path):
    ax, [label] = draw(tmp_path, [(40, 30, 60, 50)], ['3'])
    box = ax.patches[0]
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((40, 30), 20, 20)
    corners = box.get_window_extent()
    assert label.x0 == pytest.approx(corners.x0, abs=1)
    assert label.y0 == pytest.approx(corners.y1, abs=1)


def luminance(color):
    """WCAG 2's relative luminance of sRGB."""
    color = np.array(to_rgb(color))
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_labels_have_contrast(tmp_path):
    colors = [tuple(rgb) for rgb in itertools.product((0, 0.4, 0.7, 1), repeat=3)]
    ax, _ = draw(tmp_path, [(9, 9, 20, 20)] * len(colors), ['9'] * len(colors), colors)
    for text, color in zip(ax.texts, colors):
        assert to_rgb(text.get_bbox_patch().get_facecolor()) == pytest.approx(color)
        dark, light = sorted((luminance(text.get_color()), luminance(color)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # level AA


def test_mask_is_tinted_where_it_is(tmp_path):
    """Also one that reaches the edge; an empty one is no error."""
    mask = np.zeros((60, 100), bool)
    mask[:30, :50] = True
    ax, _ = draw(
        tmp_path, [(0, 0, 50, 30), (60, 40, 70, 50)], ['', ''], [RED, NAVY],
        [mask, np.zeros_like(mask)],
    )  # fmt: skip
    pixels = cv2.imread(str(tmp_path / 'sheet.png')).astype(int)

    def color_at(x, y):
        column, row = ax.transData.transform((x, y)).astype(int)
        return pixels[len(pixels) - 1 - row, column]

    blue, green, red = color_at(40, 20)
    assert 60 < red < 200 and green == blue == 0
    assert (color_at(60, 20) == 0).all() and (color_at(65, 45) == 0).all()


def test_classes_are_painted_and_named(tmp_path):
    meta = dict(
        classes=['wall', 'sky', 'tree'], palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    )
    figure, [[ax]] = new_sheet(1, ['prediction'])
    show(ax, np.zeros((2, 2, 3), np.uint8))
    # 3 and -1 are no classes.
    seen = draw_classes(ax, np.array([[2, 0], [3, -1]]), meta)
    add_legend(figure, meta, seen)
    save_sheet(figure, tmp_path / 'sheet.png')
    painted = ax.images[1].get_array()
    assert painted[0, 0, :3].tolist() == [0, 0, 1]
    assert painted[0, 1, :3].tolist() == [1, 0, 0]
    assert (painted[0, :, 3] > 0.5).all() and (painted[1, :, 3] == 0).all()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['wall', 'tree']
    colors = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert colors == [(1, 0, 0), (0, 0, 1)]


def test_legend_of_many_classes_fits(tmp_path):
    names = [f'class of number {i}' for i in range(60)]
    figure, axes = new_sheet(2, ('image', 'ground truth', 'prediction'))
    for ax in axes.flat:
        show(ax, np.zeros((8, 8, 3), np.uint8))
    add_legend(figure, dict(classes=names), range(60))
    save_sheet(figure, tmp_path / 'sheet.png')
    [legend] = figure.legends
    extent = legend.get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1
    assert 0 <= extent.y0
    # It takes no room from the pictures.
    assert all(ax.get_window_extent().y0 >= extent.y1 for ax in axes.flat)
    assert axes[0, 0].get_window_extent().width > 1.7 * figure.dpi


def test_class_colors():
    own = dict(classes=('a', 'b'), palette=[(255, 0, 51), (0, 0, 0), (9, 9, 9)])
    assert class_colors(own)[0] == (1, 0, 0.2)
    # A palette for fewer classes is none.
    made = class_colors(dict(classes='abcd', palette=[(0, 0, 0)]))
    assert len(set(made)) == 4 and (0, 0, 0) not in made


def test_spread():
    assert spread(10, 3).tolist() == [0, 4, 9]
    assert spread(2, 6).tolist() == [0, 1]  # none twice
