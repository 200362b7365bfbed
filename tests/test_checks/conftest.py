# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Good data of each format, for a test to spoil."""

import pytest

from .. import bad_data


@pytest.fixture
def coco(tmp_path):
    return bad_data.make_coco(tmp_path)


@pytest.fixture
def masks(tmp_path):
    return bad_data.make_masks(tmp_path)


@pytest.fixture
def folders(tmp_path):
    return bad_data.make_folders(tmp_path)
