# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The differences between the three tasks in inference: results and drawing."""

from typing import Any, Dict, Optional, Sequence

import numpy as np
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer


class Task:
    """What :class:`mlla_mm.apis.Inferencer` does in one of the three tasks.

    Args:
        classes (Sequence[str]): Class names, in the order of the labels.
        score_thr (float): Only detections with a higher score are kept.
        top_k (int): Number of classes in the result of a classification.
    """

    name: str
    """Value of 'task' in the results."""

    visualizer: str
    """Type of the visualizer, if the config names none."""

    def __init__(self, classes: Sequence[str], score_thr: float, top_k: int) -> None:
        self.classes = classes
        self.score_thr = score_thr
        self.top_k = top_k

    def describe(self, sample: BaseDataElement) -> Dict[str, Any]:
        """The prediction as plain data for a JSON file."""
        raise NotImplementedError

    def draw(
        self, visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement
    ) -> np.ndarray:
        """Draw a prediction on an RGB picture (H, W, 3). Returns a new picture."""
        visualizer.add_datasample('', image, sample, draw_gt=False)
        return visualizer.get_image()

    def label_map(self, sample: BaseDataElement) -> Optional[np.ndarray]:
        """The label of every pixel (H, W) in segmentation, else None."""
        return None

    def _named(self, label: int, **values: Any) -> Dict[str, Any]:
        if label >= len(self.classes):
            raise ValueError(
                f'The model predicts class {label}, but only {len(self.classes)} class '
                "names are known. Set metainfo=dict(classes=...) in the config's test "
                'dataset to the class names of the checkpoint.'
            )
        return dict(label=label, name=self.classes[label], **values)


class Detection(Task):
    name = 'detection'
    visualizer = 'DetLocalVisualizer'

    def describe(self, sample: BaseDataElement) -> Dict[str, Any]:
        found = sample.pred_instances
        found = found[found.scores > self.score_thr]
        columns = dict(box=found.bboxes.tolist(), score=found.scores.tolist())
        if 'masks' in found:
            from mmdet.structures.mask import encode_mask_results

            columns['mask'] = [
                dict(mask, counts=mask['counts'].decode())
                for mask in encode_mask_results(found.numpy().masks)
            ]
        rows = zip(found.labels.tolist(), *columns.values())
        return dict(
            instances=[
                self._named(label, **dict(zip(columns, values)))
                for label, *values in rows
            ]
        )

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
        order = counts.argsort(kind='stable')[::-1]
        shares = (counts / counts.sum()).tolist()
        return dict(
            classes=[self._named(int(labels[i]), share=shares[i]) for i in order]
        )

    def label_map(self, sample: BaseDataElement) -> np.ndarray:
        labels = sample.pred_sem_seg.data[0].numpy()
        return labels.astype(np.uint8 if len(self.classes) <= 256 else np.uint16)


class Classification(Task):
    name = 'classification'
    visualizer = 'UniversalVisualizer'

    def describe(self, sample: BaseDataElement) -> Dict[str, Any]:
        scores, labels = sample.pred_score.topk(min(self.top_k, len(sample.pred_score)))
        pairs = zip(labels.tolist(), scores.tolist())
        return dict(classes=[self._named(label, score=score) for label, score in pairs])

    def draw(
        self, visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement
    ) -> np.ndarray:
        return visualizer.visualize_cls(
            image, sample, classes=self.classes, draw_gt=False
        )


TASKS = {'mmdet': Detection, 'mmseg': Segmentation, 'mmpretrain': Classification}
"""The tasks by the default scope of their configs."""
