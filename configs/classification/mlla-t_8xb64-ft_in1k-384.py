# Fine-tuning at 384x384. Not a published result of MLLA: the schedule is that of Swin
# Transformer. Layers have no size, so a checkpoint at 224x224 fits as it is.
_base_ = './mlla-t_8xb128_in1k.py'

load_from = 'work_dirs/mlla-t_8xb128_in1k/epoch_300.pth'

train_pipeline = _base_.train_pipeline
train_pipeline[1]['scale'] = 384
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 438
test_pipeline[2]['crop_size'] = 384
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=2e-5, weight_decay=1e-8))
param_scheduler = dict(warmup=5, end=max_epochs)
auto_scale_lr = dict(base_batch_size=512)
