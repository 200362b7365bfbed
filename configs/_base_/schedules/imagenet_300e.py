max_epochs = 300
train_cfg = dict(
    type='SeededEpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1
)
val_cfg = dict(type='CheckedValLoop')
test_cfg = dict(type='CheckedTestLoop')

optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    # 5e-4 per 512 images.
    optimizer=dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
    ),
    # No decay on one-dimensional parameters and biases.
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)

param_scheduler = dict(
    type='WarmupCosineLR',
    warmup=20,
    start_ratio=1e-3,
    min_ratio=1e-2,
    begin=0,
    end=max_epochs,
    by_epoch=True,
    convert_to_iter_based=True,
)

# 8 GPUs x 128 images.
auto_scale_lr = dict(enable=False, base_batch_size=1024)
