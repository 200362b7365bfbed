# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import shutil

import pytest

from .. import bad_data
from ..nano import NANO


@pytest.fixture
def infer(call_tool, nano):
    def run(inputs, *args, config=NANO['mmpretrain'], **options):
        _, checkpoint = nano('mmpretrain')
        model = (config, checkpoint)
        return call_tool('tools/infer.py', inputs, *model, *args, **options)

    return run


def test_folder(infer, digits_coco, tmp_path):
    folder, out = tmp_path / 'pictures', tmp_path / 'out'
    shutil.copytree(digits_coco / 'val', folder)
    assert infer(folder, '--out', out, '--device', 'cpu').returncode == 0
    (folder / 'broken.jpg').write_bytes(b'not a picture')
    (folder / 'broken\x1b[31m\n\udcff.jpg').write_bytes(b'not a picture')
    result = infer(folder, '--out', out, '--device', 'cpu', '--ema', check=False)
    assert result.returncode == 1
    text = result.stdout
    assert f'Skipped: {folder / "broken.jpg"} is not an image' in text
    assert r'broken\x1b[31m\n\udcff.jpg is not an image' in text
    assert 'Read 5 pictures and 0 frames of videos, skipped 2 files.' in text
    assert f'Drawn: 5 files in {out / "drawn"}' in text
    assert f'Results: {out / "results.json"}' in text
    # No progress bar where there is no terminal.
    assert 'Inference' not in text
    assert len(list((out / 'drawn').glob('*.jpg'))) == 5
    results = json.loads((out / 'results.json').read_text())
    assert len(results) == 7 and len(results[2]['classes']) == 5


def test_batch_norm_in_the_convolutions(infer, digits_coco, tmp_path):
    found = []
    for arguments in ([], ['--fuse-conv-bn']):
        infer(digits_coco / 'val', '--out', tmp_path, '--device', 'cpu', *arguments)
        results = json.loads((tmp_path / 'results.json').read_text())
        found.append([c['score'] for result in results for c in result['classes']])
    plain, fused = found
    assert fused == pytest.approx(plain, abs=1e-4) and fused != plain


def test_other_options_of_the_decoder(infer, digits_coco, tmp_path, monkeypatch):
    """A config may let Pillow decode, which then reads no PostScript either."""
    marker = bad_data.fake_ghostscript(monkeypatch, tmp_path)
    bad_data.postscript(tmp_path / 'photo.jpg')
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{NANO['mmpretrain']}'\n"
        'test_pipeline = [\n'
        "    dict(type='LoadImageFromFile', imdecode_backend='pillow'),\n"
        "    dict(type='PackInputs'),\n"
        ']\n'
        'test_dataloader = dict(dataset=dict(pipeline=test_pipeline))\n'
    )
    picture = next((digits_coco / 'val').glob('*.png'))
    for path, status in ((tmp_path / 'photo.jpg', 1), (picture, 0)):
        result = infer(path, '--out', tmp_path / 'out', check=False, config=config)
        assert result.returncode == status
    assert not marker.exists()


def test_nothing_could_be_read(infer, tmp_path):
    result = infer(tmp_path / 'none.jpg', '--out', tmp_path / 'out', check=False)
    assert result.returncode == 1
    assert f'Skipped: {tmp_path / "none.jpg"} cannot be opened' in result.stdout


def test_cuda_graphs_need_cuda(infer, tmp_path):
    arguments = ('--device', 'cpu', '--cuda-graph')
    result = infer(tmp_path, '--out', tmp_path, *arguments, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(
        'Error: cuda_graph needs a CUDA device, and this is'
    )


def test_user_errors(call_tool, tmp_path):
    result = call_tool('tools/infer.py', tmp_path, 'none.py', 'none.pth', check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ') and 'none.py' in result.stderr
