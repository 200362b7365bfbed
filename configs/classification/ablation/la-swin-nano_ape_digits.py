_base_ = './la-swin-nano_digits.py'

model = dict(backbone=dict(ape=32))
