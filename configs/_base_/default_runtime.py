custom_imports = dict(imports=['mlla_mm'], allow_failed_imports=False)

# default_hooks is a dict, so a config that inherits changes one hook by its name and
# keeps the others. dict(type='NoHook') switches a hook off. docs/reliability.md tells
# what each hook is for.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='MainProcessLoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='WholeCheckpointHook', interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    fresh_heads=dict(type='FreshHeadsHook'),
    check_weights=dict(type='CheckWeightsHook'),
    resumed_state=dict(type='ResumedStateHook'),
    resumed_settings=dict(type='ResumedSettingsHook'),
    # BatchNorm collects its own statistics in every process. They are averaged before a
    # checkpoint and before an evaluation, so that both have the same model.
    sync_buffers=dict(type='SyncBuffersBeforeSaveHook'),
    invalid_loss=dict(type='StopOnInvalidLossHook'),
    preemption=dict(type='PreemptionHook'),
    # With `compile`, only the backbone is compiled.
    compile=dict(type='CompileBackboneHook'),
    record_run=dict(type='RecordRunHook'),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
