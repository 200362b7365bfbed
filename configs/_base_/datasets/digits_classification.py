# Made by tools/dataset_tools/make_digits.py, in the format of ImageNet.
_base_ = './imagenet.py'

data_root = 'data/digits_imagenet'
metainfo = dict(classes=tuple('0123456789'))

# No flip: a mirrored 5 is close to a 2.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='mlla_mm.datasets.transforms.classification.RandomResizedCrop',
        scale=64,
        crop_ratio_range=(0.6, 1.0),
        interpolation='bicubic',
    ),
    dict(
        type='mlla_mm.datasets.transforms.randaugment.RandAugment',
        policies=[
            dict(type='Rotate', magnitude_range=(0, 20)),
            dict(type='Shear', magnitude_range=(0, 0.3), direction='horizontal'),
            dict(type='Shear', magnitude_range=(0, 0.3), direction='vertical'),
            dict(type='ColorTransform', magnitude_range=(0, 0.9)),
            dict(type='Contrast', magnitude_range=(0, 0.6)),
            dict(type='Brightness', magnitude_range=(0, 0.6)),
        ],
        num_policies=2,
        magnitude_level=6,
        magnitude_std=0.5,
        hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
    ),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64, backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
