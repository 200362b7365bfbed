# MLLA-T on ImageNet-1K, trained with MESA.
model = dict(
    # The path imports it, whatever else a config puts into custom_imports.
    type='mlla_mm.models.classifiers.MESAClassifier',
    mesa_weight=1.0,
    data_preprocessor=dict(
        type='mlla_mm.models.classifiers.ErasingDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(type='MLLA', arch='tiny', drop_path_rate=0.2, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
    # Every batch gets one of the two, with equal probability.
    train_cfg=dict(
        augments=[
            dict(type='mlla_mm.models.classifiers.ReversedMixup', alpha=0.8),
            dict(type='mlla_mm.models.classifiers.ReversedCutMix', alpha=1.0),
        ]
    ),
)
