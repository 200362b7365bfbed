# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import shutil

import pytest

from ..nano import NANO


@pytest.fixture
def infer(call_tool, nano):
    def run(inputs, *args, **options):
        _, checkpoint = nano('mmpretrain')
        model = (NANO['mmpretrain'], checkpoint)
        return call_tool('tools/infer.py', inputs, *model, *args, **options)

    return run


def test_folder(infer, digits_coco, tmp_path):
    folder, out = tmp_path / 'pictures', tmp_path / 'out'
    shutil.copytree(digits_coco / 'val', folder)
    (folder / 'broken.jpg').write_bytes(b'not a picture')
    text = infer(folder, '--out', out, '--device', 'cpu', '--ema').stdout
    assert f'Skipped {folder / "broken.jpg"}: cannot be decoded as a picture' in text
    assert 'Read 5 pictures and 0 frames of videos, skipped 1 files.' in text
    assert f'Drawn: 5 files in {out / "drawn"}' in text
    assert f'Results: {out / "results.json"}' in text
    # No progress bar where there is no terminal.
    assert 'Inference' not in text
    assert len(list((out / 'drawn').glob('*.jpg'))) == 5
    results = json.loads((out / 'results.json').read_text())
    assert len(results) == 6 and len(results[0]['classes']) == 5


def test_nothing_could_be_read(infer, tmp_path):
    result = infer(tmp_path / 'none.jpg', '--out', tmp_path / 'out', check=False)
    assert result.returncode == 1
    assert f'Skipped {tmp_path / "none.jpg"}: no such file' in result.stdout


def test_user_errors(call_tool, tmp_path):
    result = call_tool('tools/infer.py', tmp_path, 'none.py', 'none.pth', check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ') and 'none.py' in result.stderr
