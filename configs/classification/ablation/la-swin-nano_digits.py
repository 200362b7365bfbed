# The baseline, small enough for a CPU. Each file beside this one of a name
# la-swin-nano_ROW_digits.py changes it in one respect, and
# tools/analysis_tools/run_ablation.py makes the data, trains and compares them.
_base_ = [
    '../../_base_/models/linear_attention_swin.py',
    '../../_base_/datasets/digits_classification.py',
    '../../_base_/schedules/imagenet_300e.py',
    '../../_base_/classification_runtime.py',
]

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        # 64, 16, 4 and 1 tokens.
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
        drop_path_rate=0.0,
    ),
    head=dict(num_classes=10, in_channels=256),
    train_cfg=None,
)

# Digits lie anywhere in the images, in any size and colour. Further augmentation would
# slow down the learning, which has few epochs.
data_root = 'data/digits_ablation'
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=50,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=pipeline),
)
test_dataloader = val_dataloader

max_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
# Mixed precision needs a GPU.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1.5e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        # Rates of forget gates, and tables of positions.
        custom_keys={
            '.A_log': dict(decay_mult=0.0),
            '.ape': dict(decay_mult=0.0),
        },
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(warmup=1, end=max_epochs)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(save_best=None, max_keep_ckpts=1),
    mesa=dict(type='NoHook'),
)
auto_scale_lr = dict(base_batch_size=50)
