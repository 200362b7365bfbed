_base_ = './la-swin-nano_digits.py'

model = dict(backbone=dict(block_design='sub'))
