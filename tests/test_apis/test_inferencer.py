# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import shutil
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from PIL import ExifTags, Image, ImageOps

from mlla_mm.apis import Inferencer
from mlla_mm.apis.output import summary
from mlla_mm.datasets.check import image_size
from mlla_mm.utils.checkpoint_file import CheckpointError

from .. import checkpoints
from ..nano import CLASSES, CONFIGS, NANO, build

SCOPES = list(NANO)


@pytest.fixture(scope='module')
def inferencer(nano):
    made = {}

    def get(scope):
        if scope not in made:
            made[scope] = Inferencer(*nano(scope), device='cpu')
        return made[scope]

    return get


@pytest.fixture(scope='module')
def pictures(digits_coco):
    return sorted(str(path) for path in (digits_coco / 'val').glob('*.png'))


@pytest.fixture
def folder(tmp_path, pictures):
    """Two pictures, one of them below, a file that is none, and two broken ones."""
    root = tmp_path / 'folder'
    (root / 'below').mkdir(parents=True)
    shutil.copy(pictures[0], root / 'a.png')
    shutil.copy(pictures[1], root / 'below' / 'a.png')
    (root / 'broken.jpg').write_bytes(b'not a picture')
    (root / 'empty.png').write_bytes(b'')
    (root / 'notes.txt').write_text('not a picture')
    return root


@pytest.fixture(scope='module')
def video(tmp_path_factory, pictures):
    path = tmp_path_factory.mktemp('video') / 'digits.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 64))
    for picture in pictures[:3]:
        writer.write(cv2.imread(picture))
    writer.release()
    return path


def test_detection_equals_mmdets(nano, inferencer, pictures):
    from mmdet.apis import DetInferencer
    from pycocotools import mask as mask_utils

    cfg, checkpoint = nano('mmdet')
    theirs = DetInferencer(cfg, str(checkpoint), device='cpu', show_progress=False)
    expected = theirs(pictures, return_datasamples=True)['predictions']
    actual = inferencer('mmdet')(pictures, score_thr=0.2)
    assert [result['input'] for result in actual] == pictures
    found = 0
    for result, sample in zip(actual, expected):
        assert (result['task'], result['height'], result['width']) == (
            'detection',
            64,
            64,
        )
        instances = sample.pred_instances.numpy()
        instances = instances[instances.scores > 0.2]
        for i, instance in enumerate(result['instances']):
            assert instance['label'] == instances.labels[i]
            assert instance['name'] == CLASSES['mmdet'][instances.labels[i]]
            assert instance['score'] == instances.scores[i]
            assert instance['box'] == instances.bboxes[i].tolist()
            mask = mask_utils.decode(instance['mask'])
            assert np.array_equal(mask, instances.masks[i])
        assert len(result['instances']) == len(instances)
        found += len(instances)
    assert found


def test_segmentation_equals_mmsegs(nano, inferencer, pictures, tmp_path):
    from mmseg.apis import MMSegInferencer

    cfg, checkpoint = nano('mmseg')
    theirs = MMSegInferencer(cfg, str(checkpoint), device='cpu')
    expected = theirs(pictures)['predictions']
    actual = inferencer('mmseg')(pictures, out_dir=tmp_path)
    for result, labels in zip(actual, expected):
        written = mmcv.imread(result['label_map'], 'unchanged')
        assert np.array_equal(written, labels)
        shares = {c['label']: c['share'] for c in result['classes']}
        for label in range(11):
            share = (labels == label).mean()
            assert shares.get(label, 0) == pytest.approx(share)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        for c in result['classes']:
            assert c['name'] == CLASSES['mmseg'][c['label']]


def test_classification_equals_mmpretrains(nano, inferencer, pictures):
    from mmpretrain.apis import ImageClassificationInferencer

    cfg, checkpoint = nano('mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs = ImageClassificationInferencer(cfg, str(checkpoint), device='cpu')
        all_expected = theirs(pictures)
    actual = inferencer('mmpretrain')(pictures, top_k=3)
    for result, expected in zip(actual, all_expected):
        scores = expected['pred_scores']
        best = np.argsort(-scores)[:3]
        assert [c['label'] for c in result['classes']] == best.tolist()
        assert [c['name'] for c in result['classes']] == ['abcdefghij'[i] for i in best]
        assert [c['score'] for c in result['classes']] == pytest.approx(scores[best])


@pytest.mark.parametrize('scope', SCOPES)
def test_arrays_are_what_files_are(inferencer, pictures, scope):
    images = [mmcv.imread(path) for path in pictures]
    from_files = inferencer(scope)(pictures, score_thr=0)
    from_arrays = inferencer(scope)(images, score_thr=0)
    for i, (one, other) in enumerate(zip(from_files, from_arrays)):
        assert other.pop('input') == i
        del one['input']
        assert one == other


@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_as_exif_says(inferencer, tmp_path, orientation):
    """The checks of data sets expect the same size."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.new('RGB', (48, 32))
    picture.save(tmp_path / 'a.jpg', exif=exif)
    (result,) = inferencer('mmpretrain')(tmp_path / 'a.jpg')
    with Image.open(tmp_path / 'a.jpg') as saved:
        size = ImageOps.exif_transpose(saved).size
        assert size == ((48, 32) if orientation < 5 else (32, 48))
        assert image_size(saved) == size
    assert (result['width'], result['height']) == size


@pytest.mark.parametrize('scope', SCOPES)
def test_pictures_of_one_size_share_a_batch(inferencer, pictures, scope, monkeypatch):
    images = [mmcv.imread(path) for path in pictures]
    images[3] = images[3][:40]
    alone = inferencer(scope)(images, score_thr=0.1)
    sizes = []
    forward = type(inferencer(scope)).forward

    def count(self, inputs):
        sizes.append(len(inputs))
        return forward(self, inputs)

    monkeypatch.setattr(Inferencer, 'forward', count)
    together = inferencer(scope)(images, batch_size=2, score_thr=0.1)
    # The classifier's pipeline makes all pictures alike.
    assert sizes == ([2, 2, 1] if scope == 'mmpretrain' else [2, 1, 1, 1])
    for one, other in zip(alone, together):
        assert _numbers(one) == pytest.approx(_numbers(other), abs=1e-3)


def _numbers(result):
    items = result.get('instances') or result.get('classes') or []
    return [
        number
        for item in items
        for number in (item['label'], *item.get('box', []), item.get('score', 0))
    ]


@pytest.mark.parametrize('scope', SCOPES)
def test_folder(inferencer, folder, scope):
    out = folder / 'out'
    for _ in range(2):  # the second time there are results below the folder
        results = inferencer(scope)(folder, out_dir=out)
        assert [Path(result['input']).relative_to(folder) for result in results] == [
            Path('a.png'),
            Path('below/a.png'),
            Path('broken.jpg'),
            Path('empty.png'),
        ]
    errors = [result.get('error') for result in results]
    assert errors == [None, None, 'cannot be decoded as a picture', 'empty file']
    assert json.loads((out / 'results.json').read_text()) == results
    drawn = [Path(result['drawn']).relative_to(out) for result in results[:2]]
    assert drawn == [Path('drawn/a.jpg'), Path('drawn/below/a.jpg')]
    for result in results[:2]:
        assert mmcv.imread(result['drawn']).shape == (64, 64, 3)
    lines = summary(results, out)
    assert f'Skipped {folder / "empty.png"}: empty file' in lines
    assert 'Read 2 pictures and 0 frames of videos, skipped 2 files.' in lines


def test_files_of_one_name_are_not_mixed_up(inferencer, folder, tmp_path):
    inputs = [folder / 'a.png', str(folder / 'below' / 'a.png'), folder / 'none.png']
    results = inferencer('mmpretrain')(inputs, out_dir=tmp_path / 'out')
    assert len({result['drawn'] for result in results[:2]}) == 2
    assert results[2] == dict(input=str(folder / 'none.png'), error='no such file')


@pytest.mark.parametrize('scope', SCOPES)
def test_drawing_keeps_colours(inferencer, tmp_path, scope):
    image = np.zeros((96, 96, 3), np.uint8)
    image[..., 2] = 200  # red, in BGR
    cv2.imwrite(str(tmp_path / 'red.png'), image)
    results = inferencer(scope)([image, tmp_path / 'red.png'], tmp_path / 'out', 1, 1.0)
    for result in results:
        blue, green, red = mmcv.imread(result['drawn'])[-5, -5].astype(int)
        if scope == 'mmseg':  # all classes have one colour, which covers the picture
            assert green > red > blue and red > 20
        else:
            assert red > 150 > 50 > max(blue, green)


def test_detections_are_drawn(inferencer, pictures, tmp_path):
    (none,) = inferencer('mmdet')(pictures[0], tmp_path / 'none', score_thr=1.0)
    (some,) = inferencer('mmdet')(pictures[0], tmp_path / 'some', score_thr=0.1)
    assert not none['instances'] and some['instances']
    x1, y1, x2, y2 = some['instances'][0]['box']
    difference = cv2.absdiff(mmcv.imread(none['drawn']), mmcv.imread(some['drawn']))
    assert difference[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].max() > 50


@pytest.mark.parametrize('scope', SCOPES)
def test_video(inferencer, video, scope, tmp_path):
    broken = tmp_path / 'broken.mp4'
    broken.write_bytes(b'not a video')
    results = inferencer(scope)([video, broken], tmp_path / 'out', batch_size=2)
    assert [result.get('frame') for result in results] == [0, 1, 2, None]
    assert results[3]['error'] == 'cannot be decoded as a video'
    frames = list(mmcv.VideoReader(str(video)))
    expected = inferencer(scope)(frames)
    path = tmp_path / 'out' / 'drawn' / 'digits.mp4'
    for result, alone in zip(results, expected):
        assert result['drawn'] == str(path)
        assert _numbers(result) == pytest.approx(_numbers(alone), abs=1e-3)
    drawn = mmcv.VideoReader(str(path))
    assert (drawn.fps, drawn.resolution) == (10, (64, 64))
    assert len(list(drawn)) == 3
    if scope == 'mmseg':
        assert (
            sorted((tmp_path / 'out/label_maps/digits').iterdir())[2].stem == '000002'
        )


def test_averaged_weights(nano, inferencer, pictures):
    cfg, checkpoint = nano('mmpretrain')
    averaged = Inferencer(cfg, checkpoint, 'cpu', ema=True)
    saved = torch.load(checkpoint)['state_dict_ema']
    for key, value in averaged.model.state_dict().items():
        assert torch.equal(value, saved[key])
    assert averaged(pictures[0]) != inferencer('mmpretrain')(pictures[0])


@pytest.mark.parametrize(
    'name, change, first, last',
    [
        ('detection/mask-rcnn_mlla-t_fpn_1x_coco', {}, 'person', 'toothbrush'),
        (
            'segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512',
            {'decode_head.channels': 8},
            'wall',
            'flag',
        ),
        (
            'classification/mlla-t_8xb128_in1k',
            {},
            'tench, Tinca tinca',
            'toilet tissue, toilet paper, bathroom tissue',
        ),
    ],
)
def test_names_of_classes_without_meta(tmp_path, name, change, first, last):
    """Published checkpoints do not have them; the data set of the config does."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.merge_from_dict({f'model.{key}': value for key, value in change.items()})
    torch.save(dict(state_dict=build(cfg).state_dict()), tmp_path / 'model.pth')
    inferencer = Inferencer(cfg, tmp_path / 'model.pth', 'cpu')
    assert (inferencer.classes[0], inferencer.classes[-1]) == (first, last)
    assert len(inferencer.visualizer.dataset_meta['palette']) >= len(inferencer.classes)


def test_names_of_classes_are_too_few(nano, pictures, tmp_path):
    cfg, checkpoint = nano('mmpretrain')
    saved = torch.load(checkpoint)
    saved['meta'] = dict(CLASSES=['only'])  # as mmcls wrote it
    torch.save(saved, tmp_path / 'model.pth')
    inferencer = Inferencer(cfg, tmp_path / 'model.pth', 'cpu')
    assert inferencer.classes == ['only']
    with pytest.raises(ValueError, match='names of 1 classes are known'):
        inferencer(pictures[0])


def test_leaves_the_default_scope_alone(nano, pictures):
    init_default_scope('mmengine')
    for scope in SCOPES:
        Inferencer(*nano(scope), device='cpu')(pictures[0])
    assert DefaultScope.get_current_instance().scope_name == 'mmengine'


def test_weights_have_to_fit(nano, tmp_path):
    cfg, checkpoint = nano('mmdet')
    saved = torch.load(checkpoint)
    del saved['state_dict']['roi_head.bbox_head.fc_cls.bias']
    torch.save(saved, tmp_path / 'model.pth')
    with pytest.raises(CheckpointError, match='fc_cls.bias: missing in the file'):
        Inferencer(cfg, tmp_path / 'model.pth', 'cpu')


def test_does_not_run_code(nano, tmp_path):
    cfg, _ = nano('mmpretrain')
    marker, path = tmp_path / 'marker', tmp_path / 'model.pth'
    checkpoints.save_pickle(checkpoints.attacks(marker)['exec'], path, legacy=False)
    with pytest.raises(CheckpointError, match='is not loaded'):
        Inferencer(cfg, path, 'cpu')
    assert not marker.exists()


def test_wrong_arguments(nano, inferencer, tmp_path):
    cfg, checkpoint = nano('mmpretrain')
    with pytest.raises(FileNotFoundError, match='Config not found: none.py'):
        Inferencer('none.py', checkpoint)
    with pytest.raises(FileNotFoundError, match='Checkpoint not found: none.pth'):
        Inferencer(cfg, 'none.pth')
    with pytest.raises(ValueError, match="Device 'no' cannot be used"):
        Inferencer(cfg, checkpoint, device='no')
    with pytest.raises(ValueError, match='default_scope must be one of'):
        Inferencer(Config(dict(default_scope='mmocr')), checkpoint)
    infer = inferencer('mmpretrain')
    with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
        infer([], batch_size=0)
    with pytest.raises(ValueError, match=r'got \(3, 4\) of type float64'):
        infer(np.zeros((3, 4)))
    with pytest.raises(TypeError, match='got int'):
        infer([1])
    assert infer(tmp_path) == []
