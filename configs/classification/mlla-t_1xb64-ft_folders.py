# Fine-tuning on your own images: DATA_ROOT/{train,val}/CLASS/IMAGE.
_base_ = './mlla-t_8xb128_in1k.py'

data_root = 'data/my_images'
num_classes = 10

model = dict(
    # A short training has no use for the teacher.
    mesa_weight=0.0,
    data_preprocessor=dict(num_classes=num_classes),
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='data/MLLA_T.pth')),
    head=dict(num_classes=num_classes),
)
default_hooks = dict(mesa=dict(decay=0.99))

train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    # Layers near the image change less.
    constructor='LearningRateDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.8),
)
param_scheduler = dict(warmup=3, end=max_epochs)
auto_scale_lr = dict(base_batch_size=64)
