# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest

from mlla_mm.evaluation.published import published_models


def test_every_published_model():
    models = published_models()
    assert len(models) == 26
    assert all(name == model.config.stem for name, model in models.items())
    assert all(model.config.is_file() for model in models.values())
    detector = models['mask-rcnn_mlla-s_fpn_3x_coco']
    assert detector.metrics['mask AP75'] == 48.2
    assert (detector.paper_parameters, detector.paper_flops) == (63e6, 319e9)
    assert detector.paper_throughput is None
    gated = models['la-swin-t_forget-gate_8xb128_in1k']
    assert gated.config.parent.name == 'ablation'
    assert gated.collection == 'LinearAttentionSwin'
    baseline = models['la-swin-t_8xb128_in1k'].paper_throughput
    assert gated.paper_throughput / baseline == pytest.approx(0.645, abs=5e-4)
    unpublished = models['upernet_mlla-t_8xb2-160k_ade20k-512x512']
    assert unpublished.metrics == {}
    assert unpublished.paper_flops is None


def test_without_the_repository(tmp_path):
    with pytest.raises(FileNotFoundError, match='Clone the repository'):
        published_models(tmp_path)
