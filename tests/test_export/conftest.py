# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from mmengine.config import Config

from ..nano import NANO

SPREAD = {
    'roi_head.bbox_head.fc_cls.weight': 100,
    'roi_head.bbox_head.fc_reg.weight': 10,
    'roi_head.mask_head.conv_logits.weight': 10,
}


@pytest.fixture(scope='session')
def whole(once):
    """Checkpoint and ONNX file of a small model, by scope.

    The detector's logits are spread: it finds something, and rounding decides nothing.
    """
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')

    def get(scope):
        def fill(folder):
            from ..nano import save

            path = folder / 'model.pth'
            save(scope, path)
            content = torch.load(path, weights_only=False)
            for name, factor in SPREAD.items():
                if name in content['state_dict']:
                    content['state_dict'][name] *= factor
            torch.save(content, path)
            export_onnx(NANO[scope], path, folder / 'model.onnx')

        folder = once(f'whole_{scope}', fill)
        return folder / 'model.pth', folder / 'model.onnx'

    return get


def export_onnx(config, checkpoint, out):
    from mlla_mm.apis import load_model
    from mlla_mm.apis.export import describe_and_select
    from mlla_mm.export import Options
    from mlla_mm.export.formats import write

    cfg = Config.fromfile(config)
    model = load_model(cfg, checkpoint, 'cpu')
    # Without the comparison with the model, which other tests look at.
    write(describe_and_select(model, cfg), 'onnx', out, Options((64, 96)))
