# The authors published no recipe for MLLA-T: theirs for MLLA-B, with drop path 0.3.
_base_ = [
    '../_base_/models/upernet_mlla.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/segmentation_runtime.py',
]
