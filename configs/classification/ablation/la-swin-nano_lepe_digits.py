_base_ = './la-swin-nano_digits.py'

model = dict(backbone=dict(token_mixer=dict(lepe=True)))
