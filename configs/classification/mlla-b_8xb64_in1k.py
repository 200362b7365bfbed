_base_ = './mlla-s_8xb64_in1k.py'

model = dict(
    mesa_weight=2.0,
    backbone=dict(arch='base', drop_path_rate=0.5),
    head=dict(in_channels=768),
)
