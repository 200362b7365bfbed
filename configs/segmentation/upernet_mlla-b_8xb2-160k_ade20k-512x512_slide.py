# Test in windows of the training size that overlap by a third, for images that are
# too large for the memory as a whole.
_base_ = './upernet_mlla-b_8xb2-160k_ade20k-512x512.py'

model = dict(test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
