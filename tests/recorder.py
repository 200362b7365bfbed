# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Imported by the configs of test_process_counts.py."""

from pathlib import Path

import numpy as np
import torch
from mmdet.models.detectors import MaskRCNN
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS
from torch.nn.modules.batchnorm import _BatchNorm


@HOOKS.register_module()
class UpdateRecorder(Hook):
    """Keep BatchNorm's statistics, and save every update in the work_dir.

    ``update_NUMBER_RANK.pth`` has the process's batch and losses; the first process's
    has the weights before the update and the gradients that the optimiser got, too.
    """

    def before_train(self, runner) -> None:
        self.model = runner.model
        if is_model_wrapper(self.model):
            self.model = self.model.module
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._before_step)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        self.update = dict(batch=data_batch)
        if get_rank() == 0:
            self.update['weights'] = {
                key: value.clone() for key, value in self.model.state_dict().items()
            }

    def _before_step(self, optimizer, args, kwargs) -> None:
        if get_rank() == 0:
            self.update['gradients'] = {
                name: parameter.grad.clone()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.update['losses'] = {key: value.item() for key, value in outputs.items()}
        name = f'update_{runner.iter}_{get_rank()}.pth'
        torch.save(self.update, Path(runner.work_dir) / name)


@MODELS.register_module()
class BackboneAndNeck(MaskRCNN):
    """A detector whose features get a fixed gradient, a function of the image.

    The loss is a sum of products of both signs; ``size`` is that of their magnitudes.
    """

    def loss(self, batch_inputs, batch_data_samples) -> dict:
        losses, size = [], 0
        for features in self.extract_feat(batch_inputs):
            upstream = [
                np.random.default_rng(sample.img_id).normal(size=features.shape[1:])
                for sample in batch_data_samples
            ]
            products = features.new_tensor(np.stack(upstream)) * features
            losses.append(products.sum() / len(products))
            size += products.abs().sum() / len(products)
        return dict(loss_features=losses, size=size)
