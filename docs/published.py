# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Tables of the pages, made of the metafiles that hold the numbers."""

from pathlib import Path
from typing import Dict, List

from mmengine.fileio import load

from mlla_mm.checkpoints import PUBLISHED_WEIGHTS
from mlla_mm.evaluation.markdown import markdown_table

ROOT = Path(__file__).parents[1]


def substitutions() -> Dict[str, str]:
    """Markdown for the ``{{ name }}`` of the pages, by name."""
    tables = {
        f'{Path(folder).name}_results': _results(
            ROOT / 'configs' / folder / 'metafile.yml'
        )
        for folder in (
            'detection',
            'segmentation',
            'classification',
            'classification/ablation',
        )
    }
    return {
        **tables,
        'download_weights': _download_weights(),
        'evaluate_published': _evaluate_published(),
    }


def _results(metafile: Path) -> str:
    """A row for every model of a metafile, a column for every published metric."""
    models = load(metafile)['Models']
    metrics = [_metrics(model) for model in models]
    names = list(dict.fromkeys(name for found in metrics for name in found))
    columns = ['Config', 'Parameters', 'FLOPs', *names]
    has_weights = any('Weights' in model for model in models)
    if has_weights:
        columns.append('Weights')
    rows = []
    for model, found in zip(models, metrics):
        metadata = model['Metadata']
        row = [
            f'[{model["Name"]}](../{model["Config"]})',
            f'{metadata["Parameters"] / 1e6:.1f} M',
            f'{metadata["FLOPs"] / 1e9:.4g} G',
            *(str(found.get(name, '')) for name in names),
        ]
        if has_weights:
            row.append(f'[download]({model["Weights"]})' if 'Weights' in model else '')
        rows.append(row)
    return markdown_table(columns, rows)


def _metrics(model: dict) -> Dict[str, float]:
    """Published results of a model by name; results are null where there are none."""
    results: List[dict] = model.get('Results') or []
    return {k: v for result in results for k, v in result['Metrics'].items()}


def _download_weights() -> str:
    downloads = (
        f"wget -O data/{name} '{address}'"
        for name, address in PUBLISHED_WEIGHTS.items()
    )
    return _commands('mkdir -p data', *downloads)


def _evaluate_published() -> str:
    model = load(ROOT / 'configs' / 'detection' / 'metafile.yml')['Models'][0]
    name, config = model['Name'], model['Config']
    return _commands(
        f"wget -O data/{name}.pth '{model['Weights']}'",
        f'bash tools/dist_test.sh {config} data/{name}.pth 8 \\\n'
        f'    --work-dir work_dirs/published/{name}',
        f'python tools/analysis_tools/compare_with_paper.py work_dirs/published/{name}',
    )


def _commands(*lines: str) -> str:
    return '\n'.join(['```bash', *lines, '```'])
