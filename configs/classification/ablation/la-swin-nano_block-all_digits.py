_base_ = './la-swin-nano_digits.py'

# Half as many blocks again in the third stage, twice the heads and half their width in
# queries and keys: as the reconstruction for ImageNet.
model = dict(
    backbone=dict(
        arch=dict(depths=(1, 1, 3, 1), num_heads=(2, 4, 8, 16)),
        block_design='all',
        expansion=2,
        token_mixer=dict(qk_head_dims=16),
    )
)
