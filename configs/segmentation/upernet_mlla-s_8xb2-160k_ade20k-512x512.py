# The authors published no recipe for MLLA-S: theirs for MLLA-B, with drop path 0.3.
_base_ = './upernet_mlla-t_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint='data/MLLA_S.pth')))
