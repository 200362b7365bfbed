_base_ = './default_runtime.py'

default_scope = 'mmpretrain'
default_hooks = dict(
    logger=dict(interval=100),
    # The last checkpoints are for resuming. The best of the plain and the best of the
    # averaged weights (ema_) are kept as well.
    checkpoint=dict(max_keep_ckpts=2, save_best=['accuracy/top1', 'ema_accuracy/top1']),
    visualization=dict(type='VisualizationHook', enable=False),
    mesa=dict(type='MESAHook'),
)
visualizer = dict(
    type='UniversalVisualizer',
    vis_backends=[dict(type='LocalVisBackend')],
    name='visualizer',
)
# All images have one size.
env_cfg = dict(cudnn_benchmark=True)
# Every process draws its own augmentations.
randomness = dict(seed=None, diff_rank_seed=True)
