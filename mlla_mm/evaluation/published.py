# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Published figures of our configs, from the metafiles beside them."""

from pathlib import Path
from typing import Dict, NamedTuple, Optional

from mmengine.fileio import load

_PACKAGE = Path(__file__).parents[1]
# A wheel has configs and their index inside the package, a clone beside the package.
_INSTALLED = _PACKAGE / '.mim'
REPOSITORY = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent


class Metric(NamedTuple):
    """A metric under its published name.

    Attributes:
        name (str): Its name in the metafiles.
        scale (float): Factor from the logged value to percent, the published unit.
    """

    name: str
    scale: float


#: Metrics by the name under which a run logs them.
METRICS: Dict[str, Metric] = {
    'coco/bbox_mAP': Metric('box AP', 100),
    'coco/bbox_mAP_50': Metric('box AP50', 100),
    'coco/bbox_mAP_75': Metric('box AP75', 100),
    'coco/segm_mAP': Metric('mask AP', 100),
    'coco/segm_mAP_50': Metric('mask AP50', 100),
    'coco/segm_mAP_75': Metric('mask AP75', 100),
    'mIoU': Metric('mIoU', 1),
    'accuracy/top1': Metric('Top 1 Accuracy', 1),
}
#: Appended to the name of a metric with multi-scale and flip test-time augmentation.
MULTI_SCALE = '(ms+flip)'


class PublishedModel(NamedTuple):
    """An entry of a metafile.

    Attributes:
        name (str): The model's name, the stem of its config.
        collection (str): The name of what it belongs to, its kind of network.
        config (Path): Its config file.
        parameters (int): Number of parameters, counted on our model.
        flops (int): Multiply-adds, counted on our model.
        paper_parameters (float | None): The paper's rounded number of parameters. None
            if the paper has no number.
        paper_flops (float | None): The paper's rounded number of FLOPs, or None.
        paper_throughput (float | None): The paper's throughput, or None. It has no
            unit; the ratio to that of another model is what it tells.
        metrics (dict[str, float]): Published results in percent by name. Empty if
            there are none.
    """

    name: str
    collection: str
    config: Path
    parameters: int
    flops: int
    paper_parameters: Optional[float]
    paper_flops: Optional[float]
    paper_throughput: Optional[float]
    metrics: Dict[str, float]


def published_models(repository: Path = REPOSITORY) -> Dict[str, PublishedModel]:
    """Read every metafile that ``model-index.yml`` names.

    Args:
        repository (Path): Folder with ``model-index.yml`` and ``configs/``. Defaults to
            the clone of this package, or the files that its wheel installed.

    Returns:
        dict[str, PublishedModel]: The entries by name, in the order of the files.

    Raises:
        FileNotFoundError: If there is no index.
    """
    index = repository / 'model-index.yml'
    if not index.is_file():
        raise FileNotFoundError(
            f'No published figures: {index} is missing. Clone the repository and '
            "install it with 'pip install -e .'."
        )
    models = {}
    for metafile in load(index)['Import']:
        for entry in load(repository / metafile)['Models']:
            metadata = entry['Metadata']
            metrics: Dict[str, float] = {}
            for result in entry.get('Results') or []:
                metrics.update(result['Metrics'])
            models[entry['Name']] = PublishedModel(
                name=entry['Name'],
                collection=entry['In Collection'],
                config=repository / entry['Config'],
                parameters=metadata['Parameters'],
                flops=metadata['FLOPs'],
                paper_parameters=metadata.get('Paper Parameters'),
                paper_flops=metadata.get('Paper FLOPs'),
                paper_throughput=metadata.get('Paper Throughput'),
                metrics=metrics,
            )
    return models
