# The paper states the expansion alone. Depths, heads and the width of queries and keys
# are a reconstruction from its parameters and FLOPs.
_base_ = './la-swin-t_8xb128_in1k.py'

model = dict(
    backbone=dict(
        arch=dict(embed_dims=96, depths=(2, 2, 9, 2), num_heads=(6, 12, 24, 48)),
        block_design='all',
        expansion=2,
        token_mixer=dict(qk_head_dims=16),
    )
)
