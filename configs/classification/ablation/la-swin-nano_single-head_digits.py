_base_ = './la-swin-nano_digits.py'

model = dict(backbone=dict(token_mixer=dict(num_heads=1, qk_head_dims=32)))
