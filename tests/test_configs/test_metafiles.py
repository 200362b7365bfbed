# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import re
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from .. import reference

ROOT = Path(__file__).parents[2]
METAFILES = sorted(ROOT.glob('configs/*/metafile.yml'))
PAPER = json.loads((reference.DATA / 'paper_results.json').read_text())


def models():
    for path in METAFILES:
        yield from yaml.safe_load(path.read_text())['Models']


def metrics(model: dict) -> dict:
    """All metrics of a model by name."""
    results = model.get('Results') or []  # null where nothing is published
    return {k: v for result in results for k, v in result['Metrics'].items()}


def test_the_index_names_every_metafile():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert sorted(index) == [str(path.relative_to(ROOT)) for path in METAFILES]


@pytest.mark.parametrize('model', models(), ids=lambda model: model['Name'])
def test_parameters_are_counted(model):
    cfg = Config.fromfile(ROOT / model['Config'])
    pytest.importorskip(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    built = MODELS.build(cfg.model)
    count = sum(p.numel() for p in built.parameters())
    assert count == model['Metadata']['Parameters']


@pytest.mark.parametrize('schedule', ['1x', '3x'])
def test_detection_results_are_the_papers(schedule):
    names = {
        'bbox_mAP': 'box AP',
        'bbox_mAP_50': 'box AP50',
        'bbox_mAP_75': 'box AP75',
        'segm_mAP': 'mask AP',
        'segm_mAP_50': 'mask AP50',
        'segm_mAP_75': 'mask AP75',
    }
    published = {
        row['model'].lower(): row
        for row in PAPER[f'coco_mask_rcnn_{schedule}']
        if row['model'].startswith('MLLA')
    }
    found = {
        re.search('mlla-[tsb]', model['Name'])[0]: model
        for model in models()
        if model['Name'].endswith(f'_{schedule}_coco')
    }
    assert set(found) == set(published)
    for size, row in published.items():
        assert metrics(found[size]) == {names[key]: row[key] for key in names}


def test_segmentation_results_are_the_papers():
    (row,) = (r for r in PAPER['ade20k_upernet_160k'] if r['model'] == 'MLLA-B')
    found = {m['Name']: metrics(m) for m in models() if 'upernet' in m['Name']}
    assert found.pop('upernet_mlla-b_8xb2-160k_ade20k-512x512') == {
        'mIoU': row['mIoU_ss'],
        'mIoU(ms+flip)': row['mIoU_ms'],
    }
    # Nothing is published for the others.
    assert len(found) == 2
    assert not any(found.values())


def test_classification_results_are_the_papers():
    published = {
        row['model'].lower(): row['top1']
        for row in PAPER['imagenet1k']
        if row['model'].startswith('MLLA')
    }
    found = {m['Name']: metrics(m) for m in models() if m['Name'].endswith('_in1k')}
    assert len(found) == 6
    for name, values in found.items():
        top1 = published[re.match('mlla-[tsb]', name)[0]]
        assert values == ({} if 'no-mesa' in name else {'Top 1 Accuracy': top1}), name


def test_costs_are_the_papers():
    tables = dict(
        in1k='imagenet1k',
        ade20k='ade20k_upernet_160k',
        **{'1x': 'coco_mask_rcnn_1x', '3x': 'coco_mask_rcnn_3x'},
    )
    for model in models():
        (table,) = (tables[key] for key in tables if f'_{key}' in model['Name'])
        size = re.search('mlla-[tsb]', model['Name'])[0]
        rows = [row for row in PAPER[table] if row['model'].lower() == size]
        expected = [(row['params'] * 1e6, row['flops'] * 1e9) for row in rows]
        metadata = model['Metadata']
        found = [metadata.get(f'Paper {key}') for key in ('Parameters', 'FLOPs')]
        assert [tuple(found)] == (expected or [(None, None)]), model['Name']


def test_tables_show_the_metafiles_numbers():
    for path in METAFILES:
        table = (path.parent / 'README.md').read_text().splitlines()
        for model in yaml.safe_load(path.read_text())['Models']:
            name = Path(model['Config']).name
            (row,) = (x for x in table if x.startswith('|') and f'({name})' in x)
            for value in metrics(model).values():
                assert re.search(rf'(?<![\d.]){value}(?![\d.])', row), (name, value)


def test_the_benchmarks_page_shows_the_counts():
    """Every row of its table stands for the configs whose names begin like it."""
    page = (ROOT / 'docs' / 'benchmarks.md').read_text()
    text = page.split('## Cost')[1].split('## ')[0]
    rows = [[cell.strip() for cell in x.split('|')[1:-1]] for x in text.splitlines()]
    rows = {row[0]: row[2:] for row in rows if row and row[0].startswith(('m', 'u'))}
    for model in models():
        (name,) = (name for name in rows if model['Name'].startswith(name))
        metadata = model['Metadata']
        paper = [metadata.get(f'Paper {key}') for key in ('Parameters', 'FLOPs')]
        assert rows[name] == [
            f'{metadata["Parameters"] / 1e6:.2f} M',
            f'{paper[0] / 1e6:g} M' if paper[0] else '',
            f'{metadata["FLOPs"] / 1e9:.2f} G',
            f'{paper[1] / 1e9:g} G' if paper[1] else '',
        ]
