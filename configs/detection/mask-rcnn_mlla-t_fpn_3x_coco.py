_base_ = [
    '../_base_/models/mask-rcnn_mlla_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_3x.py',
    '../_base_/detection_runtime.py',
]

model = dict(backbone=dict(drop_path_rate=0.3))
