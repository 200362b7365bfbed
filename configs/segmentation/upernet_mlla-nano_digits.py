# The demo: a small UperNet from scratch on digits, total batch 8.
_base_ = [
    '../_base_/models/upernet_mlla.py',
    '../_base_/datasets/digits_semantic.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)
        ),
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    # No pool of 1x1, which would give BatchNorm one value per image. Seven of eight
    # pixels are background.
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=64,
        pool_scales=(2, 3),
        num_classes=11,
        loss_decode=dict(class_weight=[0.2] + [1.0] * 10),
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=32,
        num_classes=11,
        loss_decode=dict(class_weight=[0.2] + [1.0] * 10),
    ),
)

max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=400)
# A small second beta forgets the first gradients soon. They are large while the model
# learns to tell digits from the background, and small later.
optim_wrapper = dict(optimizer=dict(lr=3e-3, betas=(0.9, 0.95)))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=0,
        end=max_iters + 1,
    ),
]

default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=400, max_keep_ckpts=2),
)
auto_scale_lr = dict(base_batch_size=8)
