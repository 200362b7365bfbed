# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import os
import resource
import shutil
import struct
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
from mlla_mm.checkpoints.reader import CheckpointError
from mlla_mm.engine.cuda_graph import use_cuda_graphs
from mlla_mm.models import MLLA
from mlla_mm.utils.images import image_size

from .. import bad_data, checkpoints
from ..bad_data import assert_says, noise, save
from ..nano import CLASSES, CONFIGS, NANO, build
from ..simulated_graphs import SimulatedGraph, simulated_cuda_graphs
from ..test_benchmarks.gpu import needs_gpu

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
    """A picture, one in a folder below, two broken pictures, and a text file."""
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
    """The checks of datasets expect the same sizes."""
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
    test_step = inferencer(scope).model.test_step

    def count(data):
        sizes.append(len(data['inputs']))
        return test_step(data)

    monkeypatch.setattr(inferencer(scope).model, 'test_step', count)
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
    for _ in range(2):  # the second time the folder contains results
        results = inferencer(scope)(folder, out_dir=out)
        assert [Path(result['input']).relative_to(folder) for result in results] == [
            Path('a.png'),
            Path('below/a.png'),
            Path('broken.jpg'),
            Path('empty.png'),
        ]
    errors = [result.get('error') for result in results]
    assert errors[:2] == [None, None] and errors[3] == 'is empty'
    assert_says(errors[2], 'is not an image', 'JPEG')
    assert json.loads((out / 'results.json').read_text()) == results
    drawn = [Path(result['drawn']).relative_to(out) for result in results[:2]]
    assert drawn == [Path('drawn/a.jpg'), Path('drawn/below/a.jpg')]
    for result in results[:2]:
        assert mmcv.imread(result['drawn']).shape == (64, 64, 3)
    lines = summary(results, out)
    assert f'Skipped: {folder / "empty.png"} is empty' in lines
    assert 'Read 2 pictures and 0 frames of videos, skipped 2 files.' in lines


# A function that makes a bad file, and the beginning of its error.
BAD = {
    'a_zero_bytes.jpg': (bad_data.empty, 'is empty'),
    'a_text.png': (bad_data.web_page, 'is not an image'),
    'a_postscript.jpg': (bad_data.postscript, 'is not an image'),
    'a_bomb.png': (bad_data.bomb, 'is of 1080000000 pixels'),
    'a_pipe.jpg': (bad_data.pipe, 'is a pipe'),
    'a_device.jpg': (bad_data.endless, 'is a pipe'),
    'a_link.jpg': (bad_data.link_to_nothing, 'cannot be opened'),
    'a_loop.jpg': (lambda path: path.symlink_to(path), 'cannot be opened'),
    'an_empty_video.mp4': (bad_data.empty, 'is empty'),
    'a_piped_video.mp4': (bad_data.pipe, 'is a pipe'),
    'escapes_\x1b[31m\n.png': (bad_data.web_page, 'is not an image'),
    'not_unicode_\udcff.png': (bad_data.web_page, 'is not an image'),
}
# OpenCV before 4.12 completes a cut-off picture, and before 4.11 reads no GIF.
CUT, ANIMATED = 'a_cut_off.jpg', 'animated.jpg'
# Names that would be bad names for results.
NAMES = (
    *('....png', '...png', '..png', 'two\nlines.png', '\x1b[31m.png', '\udcff.png'),
    *('写真.png', ' .png', '100%d.png', f'{"n" * 251}.png', '[bold].png'),
)
ODD = {
    '16_bit.png': noise(40, 60).astype(np.uint16) * 257,
    'grey.png': noise(40, 60),
    'transparent.png': noise(40, 60, 4),
    'grey_transparent.png': noise(40, 60, 2),
    'palette.png': noise(40, 60, 3),
    'cmyk.jpg': noise(40, 60, 4),
}
# Too thin for the pipeline, for the network, or for drawing.
THIN = {'1x1.png': (1, 1), '1x20000.png': (20000, 1), '20000x1.png': (1, 20000)}


@pytest.fixture
def gallery(tmp_path):
    root = tmp_path / 'gallery'
    (root / 'folder.jpg').mkdir(parents=True)  # a folder, in spite of its name
    for name, (spoil, _) in BAD.items():
        spoil(root / name)
    save(root / CUT, noise(40, 60, 3))
    bad_data.truncate(root / CUT)
    for name in NAMES:
        save(root / name, noise(40, 60, 3), format='PNG')
    for name, pixels in ODD.items():
        image = Image.fromarray(pixels, 'CMYK' if 'cmyk' in name else None)
        if 'palette' in name:
            image = image.convert('P')
        image.save(root / name)
    frames = [Image.fromarray(noise(40, 60))] * 3
    frames[0].save(root / ANIMATED, 'GIF', save_all=True, append_images=frames[1:])
    for name, shape in THIN.items():
        save(root / name, noise(*shape, 3))
    return root


@pytest.mark.parametrize('batch_size', [1, 4])
@pytest.mark.parametrize('scope', SCOPES)
def test_no_picture_ends_a_run(
    inferencer, gallery, tmp_path, scope, batch_size, monkeypatch
):
    marker = bad_data.fake_ghostscript(monkeypatch, tmp_path)
    out = tmp_path / 'out'
    results = inferencer(scope)(gallery, out, batch_size)
    assert not marker.exists()
    assert json.loads((out / 'results.json').read_text()) == results
    by_name = {os.path.relpath(result['input'], gallery): result for result in results}
    assert by_name.keys() == {*BAD, CUT, ANIMATED, *NAMES, *ODD, *THIN}
    for name, (_, problem) in BAD.items():
        assert by_name[name].keys() == {'input', 'error'}
        assert by_name[name]['error'].startswith(problem), name
    assert by_name[CUT].get('error') in (None, 'is truncated')
    assert by_name[ANIMATED].get('error', 'cannot be decoded').startswith('cannot be d')
    assert [by_name[x] for x in (*NAMES, *ODD) if 'error' in by_name[x]] == []
    drawn = [by_name[name]['drawn'] for name in (*NAMES, *ODD)]
    assert len(set(drawn)) == len(drawn)
    for path in drawn:
        with Image.open(path) as image:
            assert image.size == (60, 40)
        assert out / 'drawn' in Path(path).parents and '..' not in Path(path).parts
    for name in THIN:
        result = by_name[name]
        assert 'drawn' in result or result['error'].startswith('cannot be ')
    if scope == 'mmdet':
        assert_says(by_name['1x20000.png']['error'], 'processed', '1 x 20000 pixels')
    lines = summary(results, out)
    assert all(line.isprintable() for line in lines)
    assert 'Skipped: ' in lines[0] and 'more: see results.json' in lines[10]


def test_names_of_videos_stay_in_their_folder(inferencer, video, tmp_path):
    """Without its suffix, '...avi' is '..', the folder above."""
    shutil.copy(video, tmp_path / '...avi')
    results = inferencer('mmseg')(tmp_path / '...avi', tmp_path / 'out')
    maps = {Path(result['label_map']).resolve().parent for result in results}
    assert len(results) == 3 and len(maps) == 1
    assert maps.pop().parent == tmp_path.resolve() / 'out/label_maps'
    assert Path(results[0]['drawn']).parent == tmp_path / 'out/drawn'


@pytest.mark.parametrize('scope', SCOPES)
def test_a_picture_that_the_network_fails_for(inferencer, scope, tmp_path):
    """In a batch only this picture has an error. The others have their results."""

    def fail(module, inputs):
        if (inputs[0].amax((2, 3)) == inputs[0].amin((2, 3))).any():
            raise RuntimeError('no\nmemory')

    infer = inferencer(scope)
    pictures = [noise(64, 64, 3), np.zeros((64, 64, 3), np.uint8), noise(64, 64, 3)]
    alone = infer([pictures[0], pictures[2]], score_thr=0.1)
    hook = infer.model.backbone.register_forward_pre_hook(fail)
    try:
        results = infer(pictures, tmp_path, batch_size=3, score_thr=0.1)
    finally:
        hook.remove()
    assert_says(results[1]['error'], 'processed', '64 x 64 pixels', 'no memory')
    for one, other in zip(alone, results[::2]):
        assert _numbers(one) == pytest.approx(_numbers(other), abs=1e-3)
    assert 'drawn' in results[0] and 'drawn' in results[2]


def test_memory_that_runs_out(inferencer, tmp_path):
    """While a picture is decoded, or while it is drawn."""
    for side in (5000, 16000):
        (tmp_path / f'{side}.png').write_bytes(bad_data.black_png(side, side))
    save(tmp_path / 'small.png', noise(64, 64, 3))
    infer = inferencer('mmpretrain')
    infer(tmp_path / 'small.png', tmp_path / 'out')  # takes the usual memory
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    limit = pages * resource.getpagesize() + 500 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        largest, large, small = infer(tmp_path, tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert_says(largest['error'], 'cannot be decoded', 'memory')
    assert_says(large['error'], 'cannot be drawn', 'emory')
    assert 'drawn' in small and 'classes' in large


def test_an_interrupted_run_writes_its_results(inferencer, pictures, tmp_path):
    infer = inferencer('mmpretrain')
    seen = []

    def interrupt(module, inputs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    hook = infer.model.backbone.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            infer(pictures, tmp_path)
    finally:
        hook.remove()
    results = json.loads((tmp_path / 'results.json').read_text())
    assert [result['input'] for result in results] == pictures[:2]


def test_files_of_one_name_are_not_mixed_up(inferencer, folder, tmp_path):
    inputs = [folder / 'a.png', str(folder / 'below' / 'a.png'), folder / 'none.png']
    results = inferencer('mmpretrain')(inputs, out_dir=tmp_path / 'out')
    assert len({result['drawn'] for result in results[:2]}) == 2
    error = 'cannot be opened (No such file or directory)'
    assert results[2] == dict(input=str(folder / 'none.png'), error=error)


@pytest.mark.parametrize('scope', SCOPES)
def test_drawing_keeps_colours(inferencer, tmp_path, scope):
    image = np.zeros((96, 96, 3), np.uint8)
    image[..., 2] = 200  # red, in BGR
    cv2.imwrite(str(tmp_path / 'red.png'), image)
    results = inferencer(scope)([image, tmp_path / 'red.png'], tmp_path / 'out', 1, 1.0)
    for result in results:
        blue, green, red = mmcv.imread(result['drawn'])[-5, -5].astype(int)
        if scope == 'mmseg':  # the predicted class covers the picture with its colour
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
    broken.write_bytes(video.read_bytes()[:100])
    text = tmp_path / 'text.mp4'
    text.write_bytes(b'not a video')
    results = inferencer(scope)([video, broken, text], tmp_path / 'out', batch_size=2)
    assert [result.get('frame') for result in results] == [0, 1, 2, None, None]
    assert results[3]['error'] == 'cannot be decoded as a video'
    assert results[4]['error'].startswith('is not a video (AVI')
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


HEADER = b'\0\0\0\x08ftyp' + bytes(99)


@pytest.mark.parametrize('name', ['\udcff.mp4', 'pipe:.mp4', 'tcp:/127.0.0.1:1/a.mp4'])
@pytest.mark.parametrize('inside', [True, False])
def test_names_of_videos_are_paths(
    inferencer, pictures, tmp_path, name, inside, monkeypatch
):
    """FFmpeg reads some names as addresses, and OpenCV crashes if one is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(HEADER)
    shutil.copy(pictures[0], 'good.png')
    given = '.' if inside else [name, 'good.png']
    results = inferencer('mmpretrain')(given, 'out')
    errors = {Path(result['input']).name: result.get('error') for result in results}
    assert errors.pop('good.png') is None
    (error,) = errors.values()
    assert error.startswith(('has a name that is not UTF-8', 'cannot be decoded'))


def test_a_drawn_video_of_an_odd_name(inferencer, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, 'pipe:.avi')
    results = inferencer('mmpretrain')('pipe:.avi', 'out')
    assert [result['drawn'] for result in results] == ['out/drawn/pipe:.mp4'] * 3
    assert len(list(mmcv.VideoReader(str(tmp_path / 'out/drawn/pipe:.mp4')))) == 3
    results = inferencer('mmpretrain')('pipe:.avi', '\udcff')
    assert all('UTF-8' in result['error'] for result in results)


def test_nothing_is_written_through_links(inferencer, video, pictures, tmp_path):
    """Somebody else may have put links into the folder of the results."""
    victim, out = tmp_path / 'victim', tmp_path / 'out'
    victim.mkdir()
    (victim / 'thesis.txt').write_text('mine')
    (out / 'drawn').mkdir(parents=True)
    name = Path(pictures[0]).stem
    (out / 'results.json').symlink_to(victim / 'thesis.txt')
    (out / 'drawn' / f'{name}.jpg').symlink_to(victim / 'thesis.txt')
    os.mkfifo(out / 'drawn' / 'digits.mp4')
    (out / 'label_maps').symlink_to(victim)
    results = inferencer('mmpretrain')([pictures[0], video], out)
    assert not [result for result in results if 'error' in result]
    assert json.loads((out / 'results.json').read_text()) == results
    (result,) = inferencer('mmseg')(pictures[0], out)
    assert 'leads out of' in result['error']
    assert [path.name for path in victim.iterdir()] == ['thesis.txt']
    assert (victim / 'thesis.txt').read_text() == 'mine'


def test_results_that_cannot_be_written(inferencer, pictures, tmp_path):
    """The error comes before the work."""
    (tmp_path / 'results.json').mkdir()
    with pytest.raises(ValueError, match='results.json is a folder'):
        inferencer('mmpretrain')(pictures[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['results.json']
    with pytest.raises(ValueError, match='The output folder cannot be made: .*digits'):
        inferencer('mmpretrain')(pictures[0], Path(pictures[0]) / 'digits')


def test_a_video_and_a_folder_of_one_name(inferencer, video, pictures, tmp_path):
    """Frames of the video and pictures of the folder could have the same names."""
    (tmp_path / 'in/digits').mkdir(parents=True)
    shutil.copy(video, tmp_path / 'in')
    shutil.copy(pictures[0], tmp_path / 'in/digits/000000.png')
    results = inferencer('mmseg')(tmp_path / 'in', tmp_path / 'out')
    maps = {result['label_map'] for result in results}
    assert len(results) == len(maps) == 4


PLAYLISTS = {
    'concat': 'ffconcat version 1.0\nfile digits.avi\n',
    'HLS': '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ndigits.avi\n#EXT-X-ENDLIST\n',
}


@pytest.mark.parametrize('kind', PLAYLISTS)
def test_playlists_are_no_videos(inferencer, video, tmp_path, kind):
    """FFmpeg would read the files that a playlist names."""
    shutil.copy(video, tmp_path / 'digits.avi')
    playlist = tmp_path / 'film.mp4'
    playlist.write_text(PLAYLISTS[kind])
    assert mmcv.VideoReader(str(playlist)).opened
    results = inferencer('mmpretrain')([playlist, video])
    assert results[0]['error'].startswith('is not a video')
    assert [result.get('frame') for result in results[1:]] == [0, 1, 2]


@pytest.mark.parametrize(
    'suffix', ['avi', 'm4v', 'mkv', 'mov', 'mp4', 'mpeg', 'mpg', 'ts', 'webm']
)
def test_kinds_of_videos(inferencer, video, tmp_path, suffix):
    path = str(tmp_path / f'film.{suffix}')
    codec = 'VP80' if suffix == 'webm' else 'mp4v'
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*codec), 25, (64, 64))
    for frame in mmcv.VideoReader(str(video)):
        writer.write(frame)
    writer.release()
    if suffix == 'ts':
        path = Path(path).rename(tmp_path / 'film.mpg')
    results = inferencer('mmpretrain')(path)
    assert [result.get('frame') for result in results] == [0, 1, 2]


@pytest.mark.parametrize('scale, rate', [(1, 10**6), (1, 2**32 - 1), (2**31, 1)])
def test_video_of_an_impossible_rate(inferencer, video, tmp_path, scale, rate):
    """No video can be written with this rate."""
    content = video.read_bytes()
    start = content.index(b'strh') + 28
    rates = struct.pack('<II', scale, rate)
    (tmp_path / 'a.avi').write_bytes(content[:start] + rates + content[start + 8 :])
    assert mmcv.VideoReader(str(tmp_path / 'a.avi')).fps != 25
    results = inferencer('mmpretrain')(tmp_path / 'a.avi', tmp_path / 'out')
    assert [result.get('error') for result in results] == [None] * 3
    assert mmcv.VideoReader(results[0]['drawn']).fps == 25


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
    """Published checkpoints have no names. The dataset of the config has them."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.merge_from_dict({f'model.{key}': value for key, value in change.items()})
    torch.save(dict(state_dict=build(cfg).state_dict()), tmp_path / 'model.pth')
    inferencer = Inferencer(cfg, tmp_path / 'model.pth', 'cpu')
    assert (inferencer.classes[0], inferencer.classes[-1]) == (first, last)
    assert len(inferencer.visualizer.dataset_meta['palette']) >= len(inferencer.classes)


def test_names_of_classes_are_too_few(nano, pictures, tmp_path):
    cfg, checkpoint = nano('mmpretrain')
    saved = torch.load(checkpoint)
    saved['meta'] = dict(CLASSES=['only'])  # the format of mmcls
    torch.save(saved, tmp_path / 'model.pth')
    inferencer = Inferencer(cfg, tmp_path / 'model.pth', 'cpu')
    assert list(inferencer.classes) == ['only']
    with pytest.raises(ValueError, match='only 1 class names are known'):
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


@pytest.mark.parametrize('scope', SCOPES)
def test_backbones_as_simulated_cuda_graphs(nano, inferencer, pictures, scope):
    graphed = Inferencer(*nano(scope), device='cpu')
    use_cuda_graphs(graphed.model)
    with simulated_cuda_graphs():
        found = graphed(pictures[:4])
        (graph,) = SimulatedGraph.made
        assert graph() is not None
    assert found == inferencer(scope)(pictures[:4])


@needs_gpu
@pytest.mark.parametrize('scope', SCOPES)
def test_backbones_as_cuda_graphs(nano, pictures, scope, monkeypatch):
    usual = Inferencer(*nano(scope), device='cuda')
    graphed = Inferencer(*nano(scope), device='cuda', cuda_graph=True)
    calls, forward = [], MLLA.forward
    monkeypatch.setattr(MLLA, 'forward', lambda *x: calls.append(x) or forward(*x))
    graphed(pictures[:2])
    found = graphed(pictures, score_thr=0.2)
    # A usual one, three before the capture, and the captured one.
    assert len(calls) == 5
    for a, b in zip(found, usual(pictures, score_thr=0.2)):
        if scope == 'mmdet':
            a, b = (dict(scores=[i['score'] for i in x['instances']]) for x in (a, b))
        elif scope == 'mmseg':
            a, b = ({c['name']: c['share'] for c in x['classes']} for x in (a, b))
        else:
            a, b = ({c['name']: c['score'] for c in x['classes']} for x in (a, b))
        assert a == {key: pytest.approx(value, abs=1e-3) for key, value in b.items()}


def test_cuda_graphs_need_cuda(nano):
    with pytest.raises(ValueError, match="cuda_graph needs .* this is 'cpu': leave it"):
        Inferencer(*nano('mmpretrain'), device='cpu', cuda_graph=True)


def test_does_not_run_code(nano, tmp_path):
    cfg, _ = nano('mmpretrain')
    marker, path = tmp_path / 'marker', tmp_path / 'model.pth'
    checkpoints.save_pickle(checkpoints.attacks(marker)['exec'], path, legacy=False)
    with pytest.raises(CheckpointError, match='is not loaded'):
        Inferencer(cfg, path, 'cpu')
    assert not marker.exists()


@pytest.mark.parametrize('scope', SCOPES)
def test_a_config_without_a_test_is_used_as_for_its_validation(
    nano, inferencer, pictures, scope
):
    cfg, checkpoint = nano(scope)
    cfg = cfg.copy()
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = cfg.visualizer = None
    other = Inferencer(cfg, checkpoint, device='cpu')
    assert other(pictures[:1]) == inferencer(scope)(pictures[:1])
    cfg.val_dataloader = None
    with pytest.raises(ValueError, match='no test_dataloader and no val_dataloader'):
        Inferencer(cfg, checkpoint, device='cpu')


@pytest.mark.parametrize('visualizer', [dict(type='Visualizer', name='v'), dict()])
def test_a_visualizer_of_no_task(nano, pictures, tmp_path, visualizer):
    cfg, checkpoint = nano('mmpretrain')
    cfg = cfg.copy()
    cfg.visualizer = visualizer
    (result,) = Inferencer(cfg, checkpoint, 'cpu')(pictures[0], out_dir=tmp_path)
    assert 'error' not in result and 'drawn' in result


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
