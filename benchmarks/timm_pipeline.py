# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The transforms with which the authors trained on ImageNet, from timm."""

from typing import Any

from PIL import Image
from torchvision import transforms


class TimmDataset:
    """The images of a data set through the authors' transforms, from Pillow to tensor.

    As in the training of MLLA: ``rand-m9-mstd0.5-inc1``, erasing with probability 0.25,
    bicubic resizing; and for evaluation the short side resized to 256 of 224.

    Args:
        dataset (Dataset): Gives the files.
        side (int): Width and height of the results.
        is_training (bool): Whether to augment.

    Raises:
        ValueError: If timm is not installed.
    """

    def __init__(self, dataset: Any, side: int, is_training: bool) -> None:
        try:
            from timm.data import create_transform
            from timm.data.constants import (
                IMAGENET_DEFAULT_MEAN,
                IMAGENET_DEFAULT_STD,
            )
        except ImportError as error:
            raise ValueError(
                "The authors' transforms come from timm, which is not installed: "
                'pip install --no-deps timm.'
            ) from error
        self.paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
        if is_training:
            self.transform = create_transform(
                input_size=side,
                is_training=True,
                color_jitter=0.4,
                auto_augment='rand-m9-mstd0.5-inc1',
                re_prob=0.25,
                re_mode='pixel',
                re_count=1,
                interpolation='bicubic',
            )
        else:
            self.transform = transforms.Compose(
                [
                    transforms.Resize(
                        round(side * 256 / 224),
                        interpolation=transforms.InterpolationMode.BICUBIC,
                    ),
                    transforms.CenterCrop(side),
                    transforms.ToTensor(),
                    transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
                ]
            )

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert('RGB'))
