# The baseline. Each file beside this one changes it in one respect.
_base_ = [
    '../../_base_/models/linear_attention_swin.py',
    '../../_base_/datasets/imagenet.py',
    '../../_base_/schedules/imagenet_300e.py',
    '../../_base_/classification_runtime.py',
]

optim_wrapper = dict(
    paramwise_cfg=dict(
        # No decay on rates of forget gates (as in Mamba) and on tables of positions (as
        # in Swin), either. A shortcut's D is one-dimensional.
        custom_keys={
            'attn.A_log': dict(decay_mult=0.0),
            '.ape': dict(decay_mult=0.0),
        }
    )
)

# The paper has MESA for MLLA alone, and does not speak of an average of the weights.
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1'), mesa=dict(type='NoHook')
)
