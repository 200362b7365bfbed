dataset_type = 'ImageNet'
data_root = 'data/imagenet'

# As the authors' loader, which does not turn images as their EXIF data say.
load_image = dict(type='LoadImageFromFile', color_type='color_ignore_orientation')
train_pipeline = [
    load_image,
    dict(
        type='mlla_mm.datasets.transforms.classification.RandomResizedCrop',
        scale=224,
        crop_ratio_range=(0.08, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        interpolation='bicubic',
    ),
    dict(
        type='mlla_mm.datasets.transforms.classification.RandomFlip',
        prob=0.5,
        direction='horizontal',
    ),
    # timm's rand-m9-mstd0.5-inc1
    dict(
        type='mlla_mm.datasets.transforms.randaugment.RandAugment',
        policies='timm_increasing',
        num_policies=2,
        magnitude_level=9,
        magnitude_std=0.5,
        total_level=10,
        hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
    ),
    dict(type='mlla_mm.datasets.transforms.classification.PackInputs'),
    # The model's data preprocessor erases.
    dict(type='mlla_mm.datasets.transforms.erasing.DrawErasing', prob=0.25),
]
test_pipeline = [
    load_image,
    dict(
        type='mlla_mm.datasets.transforms.classification.ResizeEdge',
        scale=256,
        edge='short',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size=224),
    dict(type='mlla_mm.datasets.transforms.classification.PackInputs'),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    # An epoch is made of whole batches: 1251 of 1024 images, or 2502 of 512.
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    # Reads meta/train.txt where there is one, and else the class folders.
    dataset=dict(
        type=dataset_type, data_root=data_root, split='train', pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type, data_root=data_root, split='val', pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
