# All of Mamba: a selective SSM, which has no feature map, in Mamba's block.
_base_ = './la-swin-nano_block-all_digits.py'

model = dict(
    backbone=dict(
        token_mixer=dict(
            num_heads=1,
            qk_head_dims=32,
            feature_map='identity',
            input_gate=True,
            forget_gate=True,
            shortcut=True,
            normalization=False,
        )
    )
)
