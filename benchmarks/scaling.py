# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a recipe needs on more GPUs, by arithmetic: data, cores, network, disk."""

import argparse
import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mlla_mm.engine.batch_size import (
    recipe_batch_size,
    scale_to_batch_size,
    total_batch_size,
)
from mlla_mm.engine.parts import hooks_of, kind_of
from mlla_mm.evaluation.markdown import markdown_table

from .data import cores_needed

CONFIGS = Path(__file__).parents[1] / 'configs'
FLOAT32 = 4


class Data(NamedTuple):
    """A data set as training reads it.

    Attributes:
        name (str): Its name.
        images (int): Images of an epoch.
        file_bytes (float): Mean bytes of an image's file, as published.
        input_bytes (int): Bytes of an image that goes to the GPU, in uint8.
        core_speed (float): Images a second that one core makes.
    """

    name: str
    images: int
    file_bytes: float
    input_bytes: int
    core_speed: float


# Files: the sizes of the published archives (ILSVRC2012_img_train.tar, train2017.zip,
# ADEChallengeData2016.zip). Inputs: of COCO the largest scale. Speeds of a core:
# docs/data_speed.md.
IMAGENET = Data('ImageNet', 1_281_167, 147.9e9 / 1_281_167, 3 * 224 * 224, 311)
# 117,266 of the 118,287 images have an object.
COCO = Data('COCO', 117_266, 19.3e9 / 118_287, 3 * 800 * 1333, 126)
ADE20K = Data('ADE20K', 20_210, 967e6 / 22_210, 3 * 512 * 512, 111)


class Case(NamedTuple):
    """A recipe, and the speed of its model.

    Attributes:
        name (str): The name of the model.
        config (str): Its config below ``configs/``.
        data (Data): The data set.
        speed (float): Images a second that a GPU takes in training.
        gpus (tuple[int]): Numbers of GPUs to look at.
    """

    name: str
    config: str
    data: Data
    speed: float
    gpus: Sequence[int] = (8, 32, 128)


# Speeds: measured on an H200, forward and backward alone, without the teacher, the
# optimiser and the heads (docs/benchmarks.md). That of UperNet is an assumption.
CASES = (
    Case('MLLA-T', 'classification/mlla-t_8xb128_in1k.py', IMAGENET, 3793),
    Case('MLLA-S', 'classification/mlla-s_8xb64_in1k.py', IMAGENET, 2420),
    Case('MLLA-B', 'classification/mlla-b_8xb64_in1k.py', IMAGENET, 1535),
    Case(
        'Mask R-CNN, MLLA-T', 'detection/mask-rcnn_mlla-t_fpn_1x_coco.py',
        COCO, 141, (8,),
    ),
    Case(
        'UperNet, MLLA-T',
        'segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512.py', ADE20K, 200, (8,),
    ),
)  # fmt: skip


class Machine(NamedTuple):
    """What the arithmetic assumes of machines; gigabytes a second are 1e9 bytes.

    Attributes:
        gpus (int): GPUs of a machine. Defaults to 8.
        inside (float): GB/s that a GPU sends to others of its machine. Defaults to
            450, NVLink of an H100 or H200 in one direction by its data sheet.
        between (float): GB/s that a machine sends to another one. Defaults to 50, one
            InfiniBand adapter of 400 Gb/s.
        disk (float): GB/s at which a checkpoint is written. Defaults to 1.
    """

    gpus: int = 8
    inside: float = 450
    between: float = 50
    disk: float = 1


class Weights(NamedTuple):
    """Numbers of a model: parameters, and buffers such as BatchNorm's statistics.

    Attributes:
        parameters (int): Number of parameters, all of them trained.
        buffers (int): Number of elements of buffers.
        averaged (bool): Whether checkpoints also have an average of the weights.
    """

    parameters: int
    buffers: int
    averaged: bool

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, in float32."""
        return FLOAT32 * self.parameters

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: weights, their average, the two states of AdamW."""
        weights = self.parameters + self.buffers
        return FLOAT32 * (weights * (2 if self.averaged else 1) + 2 * self.parameters)


def count_weights(cfg: Config) -> Weights:
    """Build a config's model, without its weights' file, and count."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    return Weights(
        sum(x.numel() for x in model.parameters()),
        sum(x.numel() for x in model.buffers()),
        any(kind_of(hook) in ('MESAHook', 'EMAHook') for hook in hooks_of(cfg)),
    )


def sent_bytes(size: float, processes: int) -> float:
    """Bytes that each process sends in a ring all-reduce, 2 (n - 1) / n of the size.

    Half of them to add up, half to hand out: Patarasuk and Yuan, Bandwidth optimal
    all-reduce algorithms for clusters of workstations, 2009.
    """
    return 2 * (processes - 1) / processes * size


class Plan(NamedTuple):
    """What a recipe needs on some GPUs.

    Attributes:
        total_batch (int): Images of an update.
        learning_rate (float): The recipe's, scaled with the total batch.
        update (float): Seconds of the model in an update.
        images (float): Images a second on all GPUs.
        files (float): MB/s from the storage, for all GPUs.
        inputs (float): MB/s of decoded images to each GPU.
        cores (int): Cores for data workers, for each GPU.
        sent (float): MB of gradients that each GPU sends in an update.
        exchange (float): Seconds that this takes, when nothing else goes on.
    """

    total_batch: int
    learning_rate: float
    update: float
    images: float
    files: float
    inputs: float
    cores: int
    sent: float
    exchange: float

    @property
    def share(self) -> float:
        """The exchange's share of an update if it does not overlap with the model."""
        return self.exchange / (self.exchange + self.update)


def plan(
    cfg: Config,
    data: Data,
    speed: float,
    gpus: int,
    weights: Weights,
    machine: Optional[Machine] = None,
) -> Plan:
    """Calculate what a recipe needs, with the config's batch on each GPU.

    Args:
        cfg (Config): The config of the recipe.
        data (Data): Its data set.
        speed (float): Images a second that a GPU takes in training.
        gpus (int): Number of GPUs.
        weights (Weights): Numbers of the model.
        machine (Machine, optional): The machines. Defaults to None: ``Machine()``.
    """
    machine = machine or Machine()
    total = total_batch_size(cfg, gpus)
    scaled = copy.deepcopy(cfg)
    recipe = recipe_batch_size(cfg)
    if recipe is not None:
        scale_to_batch_size(scaled, total, recipe)
    images = gpus * speed
    sent = sent_bytes(weights.gradient_bytes, gpus)
    # The slowest link of the ring decides.
    rate = machine.inside if gpus <= machine.gpus else machine.between
    return Plan(
        total_batch=total,
        learning_rate=scaled.optim_wrapper.optimizer.lr,
        update=total / images,
        images=images,
        files=images * data.file_bytes / 1e6,
        inputs=speed * data.input_bytes / 1e6,
        cores=cores_needed(speed, data.core_speed),
        sent=sent / 1e6,
        exchange=sent / (rate * 1e9),
    )


def report(cases: Iterable[Case] = CASES, machine: Optional[Machine] = None) -> str:
    """Tables of all recipes on all numbers of GPUs, in Markdown."""
    machine = machine or Machine()
    rows: Dict[str, List[List[str]]] = {'data': [], 'network': [], 'disk': []}
    for case in cases:
        cfg = Config.fromfile(CONFIGS / case.config)
        weights = count_weights(cfg)
        for gpus in case.gpus:
            x = plan(cfg, case.data, case.speed, gpus, weights, machine)
            start = [case.name, str(gpus)]
            epoch = case.data.images / x.images
            rows['data'].append(
                [
                    *start, f'{x.total_batch:,}', f'{x.learning_rate:.3g}',
                    f'{x.images:,.0f}', f'{x.files:,.0f}', f'{x.inputs:,.0f}',
                    str(x.cores), f'{epoch:,.0f}',
                ]
            )  # fmt: skip
            rows['network'].append(
                [
                    *start, f'{x.update * 1000:.1f}', f'{x.sent:.0f}',
                    f'{x.exchange * 1000:.2f}', f'{x.share:.1%}',
                ]
            )  # fmt: skip
        size = weights.checkpoint_bytes
        rows['disk'].append(
            [
                case.name, f'{weights.parameters / 1e6:.2f}',
                f'{FLOAT32 * weights.buffers / 1e3:.0f}',
                'yes' if weights.averaged else 'no', f'{size / 1e6:,.0f}',
                f'{size / (machine.disk * 1e9):.2f}',
            ]
        )  # fmt: skip
    titles = {
        'data': [
            'Model', 'GPUs', 'images of an update', 'learning rate', 'images/s',
            'files, MB/s', 'to each GPU, MB/s', 'cores for each GPU', 's of an epoch',
        ],
        'network': [
            'Model', 'GPUs', 'ms of an update', 'MB that a GPU sends', 'ms', 'share',
        ],
        'disk': [
            'Model', 'M parameters', 'kB of buffers', 'average', 'MB of a checkpoint',
            's to write',
        ],
    }  # fmt: skip
    return '\n\n'.join(markdown_table(titles[name], rows[name]) for name in rows)


def run(args: argparse.Namespace) -> None:
    """Print the tables for the command line's numbers.

    Args:
        args (argparse.Namespace): The arguments of ``tools/analysis_tools/scaling.py``.

    Raises:
        ValueError: If a number is not positive.
    """
    for name in ('gpus', 'model_speed', 'core_speed', 'inside', 'between', 'disk'):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value <= 0:
                option = name.replace('_', '-')
                raise ValueError(f'--{option} must be positive, got {value:g}.')
    cases = []
    for case in CASES:
        data = case.data._replace(core_speed=args.core_speed or case.data.core_speed)
        cases.append(
            case._replace(
                data=data,
                speed=args.model_speed or case.speed,
                gpus=args.gpus or case.gpus,
            )
        )
    if args.models:
        known = [case.name for case in cases]
        unknown = [name for name in args.models if name not in known]
        if unknown:
            names = ', '.join(map(repr, known))
            raise ValueError(f'Unknown model {unknown[0]!r}. There are: {names}.')
        cases = [case for case in cases if case.name in args.models]
    machine = Machine(inside=args.inside, between=args.between, disk=args.disk)
    print(report(cases, machine))
