# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Small models with random weights whose predictions rounding does not change.

Plain random weights give all boxes and pixels almost the same scores. Here the last
layers are scaled, so that scores, boxes and masks differ widely.
"""

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mlla_mm.export.parts import channels_of

from .nano import NANO

CHANNELS = [8, 16, 32, 64]
BACKBONE = dict(
    arch=dict(_delete_=True, embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    init_cfg=None,
)


def detector(*changes, seed=0, sharp=True):
    """The demo's Mask R-CNN, smaller, with changes of its model's config."""
    cfg = _read('mmdet')
    cfg.merge_from_dict(
        dict(
            model=dict(
                backbone=BACKBONE,
                neck=dict(in_channels=CHANNELS, out_channels=16),
                rpn_head=dict(in_channels=16, feat_channels=16),
                roi_head=dict(
                    bbox_roi_extractor=dict(out_channels=16),
                    bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=3),
                    mask_roi_extractor=dict(out_channels=16),
                    mask_head=dict(
                        num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3
                    ),
                ),
            )
        )
    )
    return _build(cfg, changes, seed, sharp)


def one_stage(head, *changes, seed=0, sharp=True):
    """A one-stage detector with a head of mmdet, which gets five levels."""
    cfg = _read('mmdet')
    model = cfg.model
    cfg.model = dict(
        type='SingleStageDetector',
        data_preprocessor=model.data_preprocessor,
        backbone={**model.backbone, **BACKBONE},
        neck=dict(type='FPN', in_channels=CHANNELS, out_channels=16, num_outs=5),
        bbox_head=dict(
            num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1, **head
        ),
        test_cfg=dict(
            nms_pre=200,
            min_bbox_size=0,
            score_thr=0.05,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=100,
        ),
    )
    return _build(cfg, changes, seed, sharp)


def segmentor(*changes, seed=0, sharp=True):
    """The demo's UperNet, smaller, without its auxiliary head."""
    cfg = _read('mmseg')
    cfg.model.auxiliary_head = None
    cfg.merge_from_dict(
        dict(
            model=dict(
                backbone=BACKBONE,
                decode_head=dict(
                    in_channels=CHANNELS,
                    channels=8,
                    num_classes=4,
                    norm_cfg=dict(type='BN'),
                    loss_decode=dict(class_weight=None),
                ),
            )
        )
    )
    return _build(cfg, changes, seed, sharp)


def classifier(*changes, seed=0, sharp=True):
    """The demo's classifier, smaller."""
    cfg = _read('mmpretrain')
    cfg.merge_from_dict(
        dict(model=dict(backbone=BACKBONE, head=dict(in_channels=CHANNELS[-1])))
    )
    return _build(cfg, changes, seed, sharp)


def _read(scope):
    return Config.fromfile(NANO[scope])


def _build(cfg, changes, seed, sharp):
    for change in changes:
        cfg.merge_from_dict({f'model.{key}': value for key, value in change.items()})
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    for name, buffer in model.named_buffers():
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 1.5)
    if sharp:
        sharpen(model)
    return model


#: Mean and standard deviation of the outputs of last layers, in the order in which they
#: depend on each other. Deltas are moderate, so that boxes keep some area.
LAST_LAYERS = {
    'rpn_cls': (0, 2),
    'rpn_reg': (0, 0.3),
    'retina_cls': (-3, 2),
    'retina_reg': (0, 0.3),
    'atss_cls': (-3, 2),
    'atss_reg': (0, 0.3),
    'conv_cls': (-3, 2),
    'conv_reg': (1, 0.3),
    'conv_centerness': (0, 2),
    'atss_centerness': (0, 2),
    'fc_cls': (0, 3),
    'fc_reg': (0, 1),
    'conv_logits': (0, 3),
    'conv_seg': (0, 3),
    'fc': (0, 3),
}


def sharpen(model):
    """Scale what comes after the backbone, so that predictions are decisive."""
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            continue
        if not name.startswith('backbone'):
            nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
        if name.rpartition('.')[2] in LAST_LAYERS:
            names.append(name)
    order = list(LAST_LAYERS)
    for name in sorted(names, key=lambda name: order.index(name.rpartition('.')[2])):
        layer = model.get_submodule(name)
        mean, std = LAST_LAYERS[name.rpartition('.')[2]]
        with torch.no_grad():
            found = _outputs(model, layer)
            # A classifier gives each channel one value, and all get the same scale.
            scale = std / (found.std(1) if found.shape[1] > 1 else found.std())
            scale = scale.expand(len(found))
            layer.weight *= scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
            if found.shape[1] > 1:
                layer.bias.copy_(mean - scale * (found.mean(1) - layer.bias))


def _outputs(model, layer):
    """What a layer gives for a picture: a row for each channel."""
    found = []
    hook = layer.register_forward_hook(
        lambda layer, inputs, output: found.append(output.transpose(0, 1).flatten(1))
    )
    predict(model, picture(model, 0, (128, 96)))
    hook.remove()
    return torch.cat(found, 1)


def picture(model, seed, size):
    """Smooth noise (C, H, W), uint8: neighbours resemble each other, as in photos."""
    generator = torch.Generator().manual_seed(seed)
    channels = channels_of(model)
    height, width = size
    noise = torch.rand(
        1, channels, height // 8 + 2, width // 8 + 2, generator=generator
    )
    noise = nn.functional.interpolate(noise, size, mode='bicubic')
    noise = noise + 0.2 * torch.rand(noise.shape, generator=generator)
    return noise[0].mul(220).clamp(0, 255).byte()


def predict(model, image, ori_shape=None):
    """What a model predicts for a picture (C, H, W) that had some shape before."""
    size = tuple(image.shape[-2:])
    height, width = ori_shape or size
    meta = dict(
        img_shape=size,
        ori_shape=(height, width),
        pad_shape=size,
        scale_factor=(size[1] / width, size[0] / height),
    )
    sample = _sample_type(model)(metainfo=meta)
    with torch.no_grad():
        (found,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
    return found


def _sample_type(model):
    if hasattr(model, 'decode_head'):
        from mmseg.structures import SegDataSample as Sample
    elif hasattr(model, 'head'):
        from mmpretrain.structures import DataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    return Sample
