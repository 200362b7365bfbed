# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import sys

import pytest
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_dist_info
from yapf.yapflib import yapf_api

from mlla_mm.compat.openmmlab import acting_as, lay_out_configs_once


def test_a_config_is_laid_out_once(monkeypatch):
    texts = []

    def lay_out(text, **kwargs):
        texts.append(text)
        return f'{text}\n', True

    for owner in (yapf_api, sys.modules['mmengine.config.config']):
        if hasattr(owner, 'FormatCode'):
            monkeypatch.setattr(owner, 'FormatCode', lay_out)
    lay_out_configs_once()
    lay_out_configs_once()
    cfg = Config(dict(a=1))
    assert cfg.pretty_text == cfg.pretty_text == f'{texts[0]}\n'
    cfg.a = 2
    assert cfg.pretty_text == f'{texts[1]}\n'
    assert len(texts) == 2 and '2' in texts[1]


def test_a_sampler_of_another_process():
    with acting_as(2, 4):
        sampler = DefaultSampler(list(range(10)), shuffle=False)
    assert list(sampler) == [2, 6, 0]
    assert get_dist_info() == (0, 1)
    with pytest.raises(RuntimeError):
        with acting_as(2, 4):
            raise RuntimeError
    assert get_dist_info() == (0, 1)
