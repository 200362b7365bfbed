# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner


class Model(BaseModel):
    def forward(self, inputs):
        return inputs


CONFIG = 'upernet_mlla-nano_digits'


def records(work_dir) -> list:
    paths = sorted(work_dir.glob('*/vis_data/run.json'))
    return [json.loads(path.read_text()) for path in paths]


def test_trainings_and_tests_say_what_they_are(segmentor):
    usual = dict(
        config=CONFIG, unit='iteration', length=5, resumed=False, checkpoint=None,
        test_time_augmentation=False, averaged_weights=False,
    )  # fmt: skip
    resumed = dict(usual, resumed=True, checkpoint='iter_3.pth')
    assert records(segmentor / 'parts') == [dict(usual, length=3), resumed]
    tested = dict(usual, checkpoint='iter_5.pth', test_time_augmentation=True)
    # The config of a test still has the length of the training.
    assert records(segmentor / 'whole') == [usual, dict(tested, length=1200)]


def test_a_run_of_averaged_weights_without_a_training(tmp_path):
    hooks = [dict(type='RecordRunHook'), dict(type='UseEMAWeightsHook')]
    runner = Runner(
        Model(), str(tmp_path), load_from='https://a/b/epoch_7.pth?x',
        custom_hooks=hooks, experiment_name=tmp_path.name, cfg=Config(),
    )  # fmt: skip
    runner.call_hook('before_run')
    (record,) = records(tmp_path)
    assert record['averaged_weights'] and record['length'] is None
    assert record['config'] == runner.timestamp
    assert record['checkpoint'] == 'epoch_7.pth?x'
