# Types with a path are mmseg's transforms, made faster: samples stay the same.
dataset_type = 'ADE20KDataset'
data_root = 'data/ade/ADEChallengeData2016'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize',
        scale=(2048, 512),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(
        type='mlla_mm.datasets.transforms.segmentation.RandomCrop',
        crop_size=(512, 512),
        cat_max_ratio=0.75,
    ),
    dict(type='mlla_mm.datasets.transforms.segmentation.RandomFlip', prob=0.5),
    dict(type='mlla_mm.datasets.transforms.segmentation.PhotoMetricDistortion'),
    dict(type='mlla_mm.datasets.transforms.segmentation.PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    # After Resize: the metric compares at the original size.
    dict(type='LoadAnnotations'),
    dict(type='mlla_mm.datasets.transforms.segmentation.PackSegInputs'),
]

# Multi-scale and flipped, as published: fractions of the scale above. mmseg's own
# pipeline takes fractions of each image's original size instead.
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(
                    type='Resize', scale=(int(2048 * r), int(512 * r)), keep_ratio=True
                )
                for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [
                dict(
                    type='mlla_mm.datasets.transforms.segmentation.RandomFlip', prob=0.0
                ),
                dict(
                    type='mlla_mm.datasets.transforms.segmentation.RandomFlip', prob=1.0
                ),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='mlla_mm.datasets.transforms.segmentation.PackSegInputs')],
        ],
    ),
]

train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        reduce_zero_label=True,
        pipeline=train_pipeline,
    ),
)
# One image at a time: attention is global, so padding would change the result.
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation'
        ),
        reduce_zero_label=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
