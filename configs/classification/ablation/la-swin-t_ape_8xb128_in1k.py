_base_ = './la-swin-t_8xb128_in1k.py'

model = dict(backbone=dict(ape=224))
