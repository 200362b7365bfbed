# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What inference on the three tasks differs in: drawing, and results as plain data."""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from torch import Tensor


class Task:
    """A task's part of :class:`mlla_mm.apis.Inferencer`.

    Args:
        classes (Sequence[str]): Class names, in the order of the labels.
        score_thr (float): Detections need a score above it.
        top_k (int): Number of classes in a classification result.
    """

    name: str
    """Value of 'task' in the results."""

    visualizer: str
    """Type of the visualizer, unless the config names another one."""

    def __init__(self, classes: Sequence[str], score_thr: float, top_k: int) -> None:
        self.classes = classes
        self.score_thr = score_thr
        self.top_k = top_k

    def describe(self, sample: BaseDataElement) -> Dict[str, Any]:
        """A prediction as plain data, ready for JSON."""
        raise NotImplementedError

    def draw(
        self, visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement
    ) -> np.ndarray:
        """Draw a prediction on an RGB picture (H, W, 3); returns a new one."""
        visualizer.add_datasample('', image, sample, draw_gt=False)
        return visualizer.get_image()

    def label_map(self, sample: BaseDataElement) -> Optional[np.ndarray]:
        """The class of every pixel (H, W) where the task predicts it, else None."""
        return None

    def _named(self, label: int, **values: Any) -> Dict[str, Any]:
        if label >= len(self.classes):
            raise ValueError(
                f'The model predicts class {label}, but the names of '
                f'{len(self.classes)} classes are known. Set metainfo=dict(classes=...)'
                " in the config's test dataset to those of the checkpoint."
            )
        return dict(label=label, name=self.classes[label], **values)


class Detection(Task):
    name = 'detection'
    visualizer = 'DetLocalVisualizer'

    def describe(self, sample: BaseDataElement) -> Dict[str, Any]:
        found = sample.pred_instances
        found = found[found.scores > self.score_thr]
        columns = dict(
            box=found.bboxes.tolist(),
            score=found.scores.tolist(),
        )
        if 'masks' in found:
            columns['mask'] = _encode(found.masks)
        instances = [
            self._named(label, **dict(zip(columns, values)))
            for label, *values in zip(found.labels.tolist(), *columns.values())
        ]
        return dict(instances=instances)

    def draw(
        self, visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement
    ) -> np.ndarray:
        visualizer.add_datasample(
            '', image, sample, draw_gt=False, pred_score_thr=self.score_thr
        )
        return visualizer.get_image()


class Segmentation(Task):
    name = 'segmentation'
    visualizer = 'SegLocalVisualizer'

    def describe(self, sample: BaseDataElement) -> Dict[str, Any]:
        labels, counts = np.unique(self.label_map(sample), return_counts=True)
        # The largest class first.
        order = counts.argsort(kind='stable')[::-1]
        shares = (counts / counts.sum()).tolist()
        classes = [self._named(int(labels[i]), share=shares[i]) for i in order]
        return dict(classes=classes)

    def label_map(self, sample: BaseDataElement) -> np.ndarray:
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        return labels.astype(np.uint8 if len(self.classes) <= 256 else np.uint16)


class Classification(Task):
    name = 'classification'
    visualizer = 'UniversalVisualizer'

    def describe(self, sample: BaseDataElement) -> Dict[str, Any]:
        best = sample.pred_score.topk(min(self.top_k, len(sample.pred_score)))
        pairs = zip(best.indices.tolist(), best.values.tolist())
        return dict(classes=[self._named(label, score=score) for label, score in pairs])

    def draw(
        self, visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement
    ) -> np.ndarray:
        return visualizer.visualize_cls(
            image, sample, classes=self.classes, draw_gt=False
        )


TASKS = {'mmdet': Detection, 'mmseg': Segmentation, 'mmpretrain': Classification}
"""The tasks by the scope of their configs."""


def _encode(masks: Tensor) -> List[dict]:
    """Masks (n, H, W) in COCO's run-length encoding, its bytes as text."""
    from pycocotools import mask as mask_utils

    masks = np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
    return [
        dict(size=rle['size'], counts=rle['counts'].decode())
        for rle in mask_utils.encode(masks)
    ]
