# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest

from mlla_mm.models import MLLA

ARCH = dict(embed_dims=8, depths=(1, 2, 3, 1), num_heads=(1, 1, 2, 2))


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_depth_follows_the_data(prefix):
    model = MLLA(ARCH)
    # Depths follow the order of the layers in the forward pass.
    expected = {'patch_embed': 0}
    depth = 0
    for i, blocks in enumerate(ARCH['depths']):
        for j in range(blocks):
            depth += 1
            expected[f'layers.{i}.blocks.{j}'] = depth
        expected[f'layers.{i}.downsample'] = depth
        expected[f'norm{i}'] = sum(ARCH['depths']) + 1
    met = set()
    for name, _ in model.named_parameters():
        (layer,) = (key for key in expected if name.startswith(f'{key}.'))
        met.add(layer)
        depth, num_depths = model.get_layer_depth(prefix + name, prefix)
        assert depth == expected[layer], name
        assert num_depths == sum(ARCH['depths']) + 2
    assert met == set(expected) - {'layers.3.downsample'}


def test_what_follows_the_backbone_has_the_last_depth():
    assert MLLA(ARCH).get_layer_depth('head.fc.weight', 'backbone.') == (8, 9)
    # Without the prefix, a name is not one of the backbone's.
    name = 'layers.0.blocks.0.norm1.weight'
    assert MLLA(ARCH).get_layer_depth(name, 'backbone.') == (8, 9)
