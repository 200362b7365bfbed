# The demo: a small classifier from scratch on digits, total batch 32.
_base_ = [
    '../_base_/models/mlla_classifier.py',
    '../_base_/datasets/digits_classification.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/classification_runtime.py',
]

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)
        ),
        drop_path_rate=0.0,
    ),
    head=dict(num_classes=10, in_channels=256),
    train_cfg=None,
)

max_epochs = 20
train_cfg = dict(max_epochs=max_epochs)
# Mixed precision needs a GPU.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(warmup=2, end=max_epochs)

default_hooks = dict(
    logger=dict(interval=10),
    # The recipe's decay is made for its 375,300 steps. In this short training the
    # average would stay close to the initial weights.
    mesa=dict(decay=0.98),
)
auto_scale_lr = dict(base_batch_size=32)
