max_epochs = 12
train_cfg = dict(
    type='SeededEpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1
)
val_cfg = dict(type='CheckedValLoop')
test_cfg = dict(type='CheckedTestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)

param_scheduler = [
    # MMEngine reaches the full rate at iteration end - 1, the recipe at 500.
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=501),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        milestones=[8, 11],
        gamma=0.1,
    ),
]

# 8 GPUs x 2 images.
auto_scale_lr = dict(enable=False, base_batch_size=16)
