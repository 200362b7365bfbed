max_iters = 160000
train_cfg = dict(
    type='SeededIterBasedTrainLoop', max_iters=max_iters, val_interval=16000
)
val_cfg = dict(type='CheckedValLoop')
test_cfg = dict(type='CheckedTestLoop')

# The heads' norm layers are named bn, so they do decay, as in the recipe.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)

# Both begin at iteration 0, and their factors are multiplied. MMEngine reaches the last
# value of a range at iteration end - 1, the recipe at iteration end.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=0,
        end=max_iters + 1,
    ),
]

# 8 GPUs x 2 images.
auto_scale_lr = dict(enable=False, base_batch_size=16)
