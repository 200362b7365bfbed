# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Detectors as files, against mmdet's own predictions."""

import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope

pytest.importorskip('mmdet')

from mlla_mm.export import ExportError, Options, export_model, whole_model
from mlla_mm.export.detectors import make_detector
from mlla_mm.export.formats import write

from .. import decisive
from .runners import in_both_formats, open_file, skip_unless_supported

#: The size of the trace, and others: smaller and larger, odd, portrait and landscape.
TRACE = (96, 128)
SIZES = [(96, 128), (33, 33), (161, 75), (64, 203), (40, 100)]

STRIDES = [4, 8, 16, 32, 64]
GROUP_NORM = dict(type='GN', num_groups=4)
STDS = [0.1, 0.1, 0.2, 0.2]


def anchors(**options):
    return dict(
        type='AnchorGenerator', ratios=[0.5, 1.0, 2.0], strides=STRIDES, **options
    )


def coder(stds, **options):
    return dict(
        type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=stds, **options
    )


RETINA = dict(
    type='RetinaHead',
    anchor_generator=anchors(octave_base_scale=4, scales_per_octave=2),
    bbox_coder=coder([1.0] * 4),
)
FCOS = dict(type='FCOSHead', strides=STRIDES, norm_cfg=GROUP_NORM)
ATSS = dict(
    type='ATSSHead',
    norm_cfg=GROUP_NORM,
    anchor_generator=dict(
        type='AnchorGenerator',
        ratios=[1.0],
        octave_base_scale=8,
        scales_per_octave=1,
        strides=STRIDES,
    ),
    bbox_coder=coder(STDS),
)


def cascade(masks=True, num_classes=3, agnostic=True):
    """Changes that make a Cascade (Mask) R-CNN of three stages."""
    shared = dict(
        type='Shared2FCBBoxHead',
        in_channels=16,
        fc_out_channels=32,
        roi_feat_size=7,
        num_classes=num_classes,
        reg_class_agnostic=agnostic,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),
        loss_bbox=dict(type='SmoothL1Loss'),
    )
    heads = [
        dict(shared, bbox_coder=coder([x / factor for x in STDS]))
        for factor in (1, 2, 3)
    ]
    head = {
        'type': 'CascadeRoIHead',
        'num_stages': 3,
        'stage_loss_weights': [1, 0.5, 0.25],
        'bbox_head': heads,
    }
    changes = {'type': 'CascadeRCNN', 'roi_head': head, 'train_cfg': None}
    return changes, {} if masks else no_masks()


def no_masks():
    return {'roi_head.mask_head': None, 'roi_head.mask_roi_extractor': None}


def softmax_rpn():
    return {'rpn_head.loss_cls': dict(type='CrossEntropyLoss', use_sigmoid=False)}


def classes(number):
    return {
        'roi_head.bbox_head.num_classes': number,
        'roi_head.mask_head.num_classes': number,
    }


def convolutional_boxes():
    """Heads with convolutions, which runtimes refuse for an empty batch."""
    return {
        'roi_head.bbox_head': dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=16)
    }


NMS = dict(type='nms', iou_threshold=0.5)
TWO_STAGE = {
    'mask': [],
    'faster': [no_masks()],
    'one box for all classes': [{'roi_head.bbox_head.reg_class_agnostic': True}],
    'one mask for all classes': [{'roi_head.mask_head.class_agnostic': True}],
    'convolutions': [convolutional_boxes()],
    'cascade': cascade(masks=False),
    'cascade mask': cascade(),
    'cascade by class': cascade(agnostic=False),
    'softmax rpn': [softmax_rpn()],
    'one class': [classes(1)],
    'many classes': [
        classes(80),
        {'test_cfg.rpn.max_per_img': 400, 'test_cfg.rcnn.score_thr': 0.0},
    ],
    'few anchors': [{'test_cfg.rpn.nms_pre': 20, 'test_cfg.rpn.max_per_img': 30}],
    'all anchors': [{'test_cfg.rpn.nms_pre': 100000}],
    'no nms_pre': [{'test_cfg.rpn.nms_pre': -1}],
    'large boxes': [{'test_cfg.rpn.min_bbox_size': 12}],
    'small boxes, too': [{'test_cfg.rpn.min_bbox_size': -1}],
    'one nms for all classes': [{'test_cfg.rcnn.nms': dict(class_agnostic=True)}],
    # mmcv's NMS goes by class nevertheless if there are so many boxes.
    'one nms for few boxes': [
        {'test_cfg.rcnn.nms': dict(class_agnostic=True, split_thr=150)}
    ],
    'no nms': [{'test_cfg.rcnn.nms': None}],
    'full list': [{'test_cfg.rcnn.max_per_img': 12}],
    'no limit': [{'test_cfg.rcnn.max_per_img': -1}],
    'two levels': [
        {
            'neck.num_outs': 4,
            'rpn_head.anchor_generator.strides': [4, 8, 16, 32],
            'roi_head.bbox_roi_extractor.featmap_strides': [4, 8],
            'roi_head.mask_roi_extractor.featmap_strides': [4],
        }
    ],
    # mmdet cannot paste masks that are outside as a whole.
    'boxes outside': [
        no_masks(),
        {
            'rpn_head.bbox_coder.clip_border': False,
            'roi_head.bbox_head.bbox_coder.clip_border': False,
        },
    ],
    'old alignment': [
        {'roi_head.bbox_roi_extractor.roi_layer': dict(aligned=False, sampling_ratio=2)}
    ],
}
ONE_STAGE = {
    'retina': RETINA,
    'retina with softmax': dict(
        RETINA, loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False)
    ),
    'fcos': FCOS,
    'fcos of norm_on_bbox': dict(
        FCOS, norm_on_bbox=True, centerness_on_reg=True, center_sampling=True
    ),
    'atss': ATSS,
}
TESTED = {
    **{name: (decisive.detector, changes) for name, changes in TWO_STAGE.items()},
    **{name: (decisive.one_stage, [head]) for name, head in ONE_STAGE.items()},
}
#: In these every branch of the export is taken.
USUAL = {
    'torchscript': ('faster', 'two levels', 'retina with softmax'),
    'onnx': ('cascade by class', 'one nms for few boxes', 'fcos of norm_on_bbox'),
}


def mmdet_predictions(model, image, threshold):
    """What mmdet finds, and the probabilities (K, h, w) of its masks within boxes."""
    has_rois = hasattr(model, 'roi_head')
    head = model.roi_head if has_rois else model.bbox_head
    usual = head.test_cfg.score_thr
    heads, logits, hooks = [], [], []
    if has_rois and head.with_mask:
        heads = [head.mask_head]
        if isinstance(heads[0], torch.nn.ModuleList):
            heads = list(heads[0])
    for mask_head in heads:
        hooks.append(
            mask_head.register_forward_hook(lambda *call: logits.append(call[-1]))
        )
    head.test_cfg.score_thr = threshold
    found = decisive.predict(model, image).pred_instances
    head.test_cfg.score_thr = usual
    for hook in hooks:
        hook.remove()
    if not logits:
        return found, None
    masks = torch.stack(logits).sigmoid().mean(0)
    labels = found.labels * (not heads[0].class_agnostic)
    return found, masks[torch.arange(len(labels)), labels]


def check(model, run, image, threshold):
    """A file finds the same in an image as mmdet, which the number is returned of."""
    expected, probabilities = mmdet_predictions(model, image, threshold)
    images = image.flip(0)[None].float()
    boxes, scores, labels, *masks = run(images, torch.tensor(threshold))
    assert len(boxes) == len(scores) == len(labels) == len(expected)
    is_pair = expected.labels[:, None] == labels
    is_pair &= (expected.bboxes[:, None] - boxes).abs().amax(-1) < 0.01
    is_pair &= (expected.scores[:, None] - scores).abs() < 1e-4
    assert is_pair.any(0).all() and is_pair.any(1).all()
    # Best score first.
    assert (scores.diff() <= 0).all()
    assert len(masks) == ('masks' in expected)
    if masks and not len(expected):
        assert masks[0].shape == (0, 28, 28)
    elif masks:
        partner = is_pair.int().argmax(1)
        torch.testing.assert_close(masks[0][partner], probabilities, rtol=0, atol=1e-3)
    return len(expected)


def check_sizes(model, run, sizes):
    for seed, size in enumerate(sizes, 5):
        assert check(model, run, decisive.picture(model, seed, size), 0.05) >= 5
    assert check(model, run, decisive.picture(model, 0, (70, 90)), 1.0) == 0


def whole(model):
    return whole_model(model, 'detection', reverse_channels=True, metadata={})


@pytest.mark.parametrize('format', ['torchscript', 'onnx'])
def test_mask_rcnn(format, tmp_path):
    """The whole way, with all sizes and a file that was compared."""
    skip_unless_supported(format)
    model = decisive.detector()
    path = tmp_path / 'model'
    differences = export_model(whole(model), format, path, Options(TRACE))
    assert set(differences) == {'boxes', 'scores', 'masks'}
    check_sizes(model, open_file(format, path), SIZES)


@pytest.mark.parametrize('format, name', in_both_formats(TESTED, USUAL))
def test_detectors(format, name, tmp_path):
    skip_unless_supported(format)
    make, changes = TESTED[name]
    model = make(*changes)
    # Not compared by itself, which takes as long as this test.
    write(whole(model), format, tmp_path / 'model', Options(TRACE))
    check_sizes(model, open_file(format, tmp_path / 'model'), SIZES[1:3])


@pytest.mark.parametrize('format', ['torchscript', 'onnx'])
def test_no_proposals(format, tmp_path):
    """The heads have convolutions, which some runtimes refuse without any box."""
    skip_unless_supported(format)
    model = decisive.detector(convolutional_boxes(), {'test_cfg.rpn.min_bbox_size': 60})
    write(whole(model), format, tmp_path / 'model', Options(TRACE))
    run = open_file(format, tmp_path / 'model')
    assert check(model, run, decisive.picture(model, 1, (33, 33)), 0.05) == 0
    assert check(model, run, decisive.picture(model, 1, (96, 128)), 0.05) > 0


#: Parts of mmdet's own configs, and what the message names.
UNKNOWN = {
    'detr/detr_r50_8xb2-500e_coco': 'DETR',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco': 'Mask2Former',
    'solov2/solov2_r50_fpn_1x_coco': 'SOLOv2',
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco': 'PanopticFPN',
    'fast_rcnn/fast-rcnn_r50_fpn_1x_coco': 'FastRCNN',
    'rpn/rpn_r50_fpn_1x_coco': 'RPNHead',
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco': 'EmbeddingRPNHead',
    'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco': 'CascadeRPNHead',
    'htc/htc_r50_fpn_1x_coco': 'HybridTaskCascadeRoIHead',
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco': 'PointRendRoIHead',
    'ms_rcnn/ms-rcnn_r50_fpn_1x_coco': 'MaskScoringRoIHead',
    'double_heads/dh-faster-rcnn_r50_fpn_1x_coco': 'DoubleHeadRoIHead',
    'sabl/sabl-faster-rcnn_r50_fpn_1x_coco': 'SABLHead',
    'groie/faste-rcnn_r50_fpn_groie_1x_coco': 'GenericRoIExtractor',
    'seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1': 'SeesawLoss',
    'dcn/faster-rcnn_r50_fpn_dpool_1x_coco': 'DeformRoIPoolPack',
    'pascal_voc/faster-rcnn_r50-caffe-c4_ms-18k_voc0712': 'shared_head',
    'yolox/yolox_s_8xb8-300e_coco': 'YOLOXHead',
    'yolof/yolof_r50-c5_8xb8-1x_coco': 'add_ctr_clamp=True',
    'gfl/gfl_r50_fpn_1x_coco': 'GFLHead',
    'paa/paa_r50_fpn_1x_coco': 'PAAHead',
    'tood/tood_r50_fpn_1x_coco': 'TOODHead',
    'fsaf/fsaf_r50_fpn_1x_coco': 'TBLRBBoxCoder',
    'reppoints/reppoints-moment_r50_fpn_1x_coco': 'RepPointsHead',
}


@pytest.mark.parametrize(
    'config, named',
    [
        pytest.param(
            *item, marks=[] if number % 3 == 0 else pytest.mark.slow, id=item[1]
        )
        for number, item in enumerate(UNKNOWN.items())
    ],
)
def test_unknown_detector(config, named):
    """What predicts in another way is refused, and not written wrongly."""
    cfg = get_config(f'mmdet::{config}.py').model
    no_weights(cfg)
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        model = MODELS.build(cfg)
    with pytest.raises(ExportError, match=f'{named}.* not exported.*part .backbone'):
        make_detector(model)


def no_weights(cfg):
    """Let a model's config name no file of weights."""
    if isinstance(cfg, dict):
        cfg.pop('init_cfg', None)
    for value in cfg.values() if isinstance(cfg, dict) else cfg:
        if isinstance(value, (dict, list)):
            no_weights(value)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'test_cfg.rcnn.nms.type': 'soft_nms'}, "type 'soft_nms' .*nms.type='nms'"),
        ({'test_cfg.rpn.nms.offset': 1}, 'NMS with offset = 1 .*Leave offset out'),
        ({'test_cfg.rcnn.nms.max_num': 5}, 'NMS with max_num = 5'),
        (
            {'roi_head.mask_roi_extractor.roi_layer.pool_mode': 'max'},
            "RoIAlign with pool_mode 'max'",
        ),
        (
            {
                'roi_head.bbox_roi_extractor.roi_layer': dict(
                    _delete_=True, type='RoIPool', output_size=7
                )
            },
            'RoIPool with pool_mode None',
        ),
    ],
)
def test_refused_options(change, message):
    model = decisive.detector(change, sharp=False)
    with pytest.raises(ExportError, match=message):
        whole(model)


def test_smallest_box_of_a_one_stage_detector():
    """mmdet measures it in the picture before it was resized."""
    model = decisive.one_stage(RETINA, {'test_cfg.min_bbox_size': 5}, sharp=False)
    with pytest.raises(ExportError, match='min_bbox_size = 5 .*min_bbox_size=0'):
        whole(model)
