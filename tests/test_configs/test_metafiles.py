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
METAFILES = sorted(ROOT.glob('configs/**/metafile.yml'))
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
    published = {row['model'].lower(): row['top1'] for row in PAPER['imagenet1k']}
    table_7 = {row['model'].lower(): row for row in PAPER['mesa_imagenet1k']}
    without = {model: row['top1_without'] for model, row in table_7.items()}
    found = {
        m['Name']: metrics(m) for m in models() if re.match('mlla-._.*_in1k', m['Name'])
    }
    assert len(found) == 6
    for name, values in found.items():
        figures = without if 'no-mesa' in name else published
        assert values == {'Top 1 Accuracy': figures[name[: len('mlla-t')]]}, name
    # The README says where the paper contradicts itself.
    with_mesa = {model: row['top1_with'] for model, row in table_7.items()}
    assert {m: x for m, x in with_mesa.items() if x != published[m]} == {'mlla-s': 84.3}
    readme = (ROOT / 'configs' / 'classification' / 'README.md').read_text()
    assert re.search(r'Table 7 prints 84\.3', readme)


#: What the paper calls the rows of Tables 1 and 2, and what our configs do.
ABLATION = {
    'baseline': 'la-swin-t',
    '+ input gate': 'la-swin-t_input-gate',
    '+ forget gate': 'la-swin-t_forget-gate',
    '+ shortcut': 'la-swin-t_shortcut',
    '- normalization': 'la-swin-t_no-normalization',
    '- multi-head': 'la-swin-t_single-head',
    '+ block design, all replaced': 'la-swin-t_block-all',
    '+ block design, attention sub-block replaced': 'la-swin-t_block-sub',
    '+ APE': 'la-swin-t_ape',
    '+ LePE': 'la-swin-t_lepe',
    '+ CPE': 'la-swin-t_cpe',
    '+ RoPE': 'la-swin-t_rope',
}


def test_ablation_is_the_papers():
    network = 'imagenet1k_linear_attention_swin_t'
    published = {
        f'{ABLATION[row["design"]]}_8xb128_in1k': row
        for table in ('ablation', 'position_encodings')
        for row in PAPER[f'{table}_{network}']
    }
    found = {m['Name']: m for m in models() if m['Name'].startswith('la-swin')}
    assert set(found) == set(published)
    for name, row in published.items():
        metadata = found[name]['Metadata']
        assert metrics(found[name]) == {'Top 1 Accuracy': row['top1']}
        assert metadata['Paper Parameters'] == row['params'] * 10**6
        assert metadata['Paper FLOPs'] == pytest.approx(row['flops'] * 1e9)
        assert metadata['Paper Throughput'] == row['throughput']


def test_costs_are_the_papers():
    tables = dict(
        in1k='imagenet1k',
        ade20k='ade20k_upernet_160k',
        **{'1x': 'coco_mask_rcnn_1x', '3x': 'coco_mask_rcnn_3x'},
    )
    for model in models():
        (table,) = (tables[key] for key in tables if f'_{key}' in model['Name'])
        if model['In Collection'] == 'LinearAttentionSwin':
            continue  # compared above
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
    """Every row of its table stands for all configs of a model."""
    page = (ROOT / 'docs' / 'benchmarks.md').read_text()
    text = page.split('## Cost')[1].split('## ')[0]
    rows = [[cell.strip() for cell in x.split('|')[1:-1]] for x in text.splitlines()]
    rows = {row[0]: row[2:] for row in rows if len(row) == 6}
    # What follows is batch and schedule.
    names = {m['Name']: re.split(r'_(?=\d+x)', m['Name'])[0] for m in models()}
    assert rows.keys() == {'Config', '---', *names.values()}
    for model in models():
        name = names[model['Name']]
        metadata = model['Metadata']
        paper = [metadata.get(f'Paper {key}') for key in ('Parameters', 'FLOPs')]
        assert rows[name] == [
            f'{metadata["Parameters"] / 1e6:.2f} M',
            f'{paper[0] / 1e6:g} M' if paper[0] else '',
            f'{metadata["FLOPs"] / 1e9:.2f} G',
            f'{paper[1] / 1e9:g} G' if paper[1] else '',
        ]
