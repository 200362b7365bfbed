# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pipelines of the recipes with the toolboxes' own transforms, to compare with."""

import copy

from mlla_mm.engine.parts import kind_of, parts_of

OURS = 'mlla_mm.datasets.transforms.'


def of_the_toolbox(pipeline):
    """A copy of a pipeline whose transforms are the toolbox's of the same names.

    ``DrawErasing``, which no toolbox has, stays; the option ``decode_masks`` goes.
    """
    pipeline = copy.deepcopy(pipeline)
    ours = [
        part
        for part in parts_of(pipeline)
        if part.get('type', '').startswith(OURS) and kind_of(part) != 'DrawErasing'
    ]
    assert ours
    for part in ours:
        part['type'] = kind_of(part)
        part.pop('decode_masks', None)
    return pipeline
