# Another head on the same backbone, data and schedule.
_base_ = './upernet_mlla-t_8xb2-160k_ade20k-512x512.py'

decode_head = dict(
    _delete_=True,
    type='SegformerHead',
    in_channels=[64, 128, 256, 512],
    in_index=[0, 1, 2, 3],
    channels=256,
    num_classes=150,
    norm_cfg=dict(type='SyncBN', requires_grad=True),
)
model = dict(decode_head=decode_head, auxiliary_head=None)
