# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The documentation: that it builds, and that what it says to type works."""

import argparse
import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import List, Tuple

import pytest
import torch

from mlla_mm.compat import versions
from mlla_mm.compat.stack import ORIGINAL, collect_stack, compiled_mmcv_commands

from . import checkpoints, nano
from .processes import ROOT

PAGES = sorted(ROOT.glob('docs/*.md'))
TEXTS = [ROOT / 'README.md', *sorted(ROOT.glob('configs/**/README.md')), *PAGES]
NOTEBOOK = ROOT / 'demo' / 'mlla_mm_demo.ipynb'
# What a launcher hands to its Python tool.
LAUNCHED = {
    'tools/dist_train.sh': ('tools/train.py', slice(0, 1), slice(2, None)),
    'tools/dist_test.sh': ('tools/test.py', slice(0, 2), slice(3, None)),
    'tools/slurm_train.sh': ('tools/train.py', slice(2, 3), slice(3, None)),
    'tools/slurm_test.sh': ('tools/test.py', slice(2, 4), slice(4, None)),
}
# Of the scripts that set up, it takes the variables.
SET_UP = ROOT / 'tools' / 'misc' / 'setup_env.sh'
NUMBERS = ('GPUS', 'N', 'H', 'W')


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> List[str]:
    """Code blocks, those in lists without their indentation."""
    found = re.findall(rf'^( *)```(?:{language})\n(.*?)^ *```', text, re.M | re.S)
    return [re.sub(rf'^{indent}', '', code, flags=re.M) for indent, code in found]


def inline(text: str) -> List[str]:
    without_blocks = re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S)
    return re.findall(r'(?<!`)`([^`\n]+)`(?!`)', without_blocks)


def commands(text: str) -> Iterator[Tuple[str, List[str], List[str]]]:
    """Every call of one of our tools: its path, arguments, and variables before it."""
    for block in blocks(text, 'bash|shell|console'):
        variables = {}
        for line in block.replace('\\\n', ' ').splitlines():
            for variable, value in variables.items():
                line = line.replace(f'${variable}', value)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r'[A-Z]+=', words[0]):
                variable, value = words[0].split('=')
                variables[variable] = value
            yield from our_command(words)
    for code in inline(text):
        # Without arguments it is no more than a name.
        if re.match(r'(python|bash) tools/\S+ ', code):
            yield from our_command(shlex.split(code))


def our_command(words: List[str]) -> Iterator[Tuple[str, List[str], List[str]]]:
    variables = []
    while words and (words[0] in ('python', 'bash') or '=' in words[0]):
        first, *words = words
        if '=' in first:
            variables.append(first.split('=')[0])
    if words and words[0].startswith('tools/'):
        # What may be left out is in brackets, what there is to choose from in braces.
        words = [re.sub(r'[][]|,\w+(?=.*})|[{}]', '', word) for word in words]
        words = [word for word in words if word != '...']
        tool, *arguments = ['1' if word in NUMBERS else word for word in words]
        yield tool, arguments, variables


def config_exists(config: str) -> bool:
    """Whether it is in the repository, or one that a page tells to write."""
    texts = [path.read_text() for path in TEXTS]
    named = (f'```python\n# {config}\n', f'in `{config}`:')
    written = any(name in text for name in named for text in texts)
    return written or (ROOT / config).is_file()


class ParsedError(Exception):
    """Raised in the place of a tool's work."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """Let a tool parse arguments, in this process and without doing anything."""

    def parse_args(self, *args, **kwargs):
        parsed = original(self, *args, **kwargs)
        if 'arguments' in parsed:  # of the tool that is called by this one
            return parsed
        raise ParsedError

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    # A script's own folder is on the path.
    monkeypatch.syspath_prepend(ROOT / 'tools')

    def run(tool: str, *arguments: str) -> None:
        assert (ROOT / tool).is_file(), tool
        monkeypatch.setattr(sys, 'argv', [tool, *arguments])
        try:
            runpy.run_path(str(ROOT / tool), run_name='__main__')
        except ParsedError:
            return
        except SystemExit as end:
            if end.code == 0:  # --help
                return
        pytest.fail(f'{tool} {" ".join(arguments)}: {capsys.readouterr().err}')

    return run


def test_there_are_commands():
    assert sum(len(list(commands(path.read_text()))) for path in PAGES) > 30


@pytest.mark.parametrize('path', TEXTS, ids=name)
def test_commands_are_understood(path, parse, pytestconfig):
    for tool, arguments, variables in commands(path.read_text()):
        for config in (x for x in arguments if x.startswith('configs/')):
            assert config_exists(config), config
        if tool.endswith('.sh'):
            script = (ROOT / tool).read_text()
            documented = script.partition('# Environment')[2] or SET_UP.read_text()
            assert set(variables) <= set(re.findall(r'\w+', documented)), tool
        if tool in LAUNCHED:
            tool, first, others = LAUNCHED[tool]
            arguments = [*arguments[first], *arguments[others]]
        if tool.endswith('.py'):
            parse(tool, *arguments)
        else:
            usage = re.search(r'^# Usage: \S+(.*)', script, re.M)[1]
            known = set(re.findall(r'[\w-]+', usage))
            if 'pytest' in known:
                markers = pytestconfig.getini('markers')
                known |= {'-m', *(marker.split(':')[0] for marker in markers)}
            assert set(arguments) <= known, tool


@pytest.mark.parametrize('path', TEXTS, ids=name)
def test_what_is_named_exists(path):
    sources = [*ROOT.glob('tools/**/*.py'), ROOT / 'mlla_mm' / 'engine' / 'options.py']
    known = set(
        re.findall(r"'(--[a-z][a-z0-9-]+)'", '\n'.join(map(Path.read_text, sources)))
    )
    for code in inline(path.read_text()):
        # Commands are parsed above.
        if code.startswith(('pip ', 'python ', 'bash ', 'SRUN_ARGS=')):
            continue
        for option in re.findall(r'(?<![\w"-])--[a-z][a-z0-9-]+', code):
            assert option in known, code
        for file in re.findall(r'(?<![\w./])tools/[\w/]+\.(?:py|sh)', code):
            assert (ROOT / file).is_file(), code
        if re.fullmatch(r'configs/\S+\.py', code):
            assert config_exists(code), code
        elif re.fullmatch(r'(configs|demo|docs|mlla_mm|tests)/[\w./-]+', code):
            assert (ROOT / code).exists(), code


def test_extras_exist():
    found = set()
    for path in TEXTS:
        for names in re.findall(r"'\.\[([\w,-]+)\]'", path.read_text()):
            assert set(names.split(',')) <= versions.EXTRAS.keys(), path
            found |= set(names.split(','))
    assert found >= {'torch', 'onedl', 'torch21', 'openmmlab'}


def strings(path: Path) -> Iterator[str]:
    """Literals of a file, joined as Python joins them; parts of formatted ones."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_error_messages_are_those_of_the_code():
    page = (ROOT / 'docs' / 'installation.md').read_text()
    rows = re.findall(r'^\| `([^`]+)` \|', page.split('## Error messages')[1], re.M)
    assert len(rows) > 15
    ours = [text for path in ROOT.glob('mlla_mm/**/*.py') for text in strings(path)]
    # Of PyTorch, torchvision, MMEngine, mmdet, setuptools and OpenCV.
    others = {
        'AmpOptimizerWrapper',
        "No module named 'mmcv._ext'",
        'operator torchvision::nms does not exist',
        'MMCV==… is used but incompatible',
        "No module named 'pkg_resources'",
        'libGL.so.1: cannot open shared object file',
    }
    assert others < set(rows)
    for row in set(rows) - others:
        for part in row.split('…'):
            assert any(part in text for text in ours), row


def test_how_to_compile_mmcv():
    """The page has what the error message says, for the stack that is in use."""
    page = (ROOT / 'docs' / 'installation.md').read_text()
    stack = collect_stack()
    mmcv = stack.packages['mmcv']
    if 'mmcv-lite' in mmcv or len(mmcv) != 1:
        pytest.skip('not one of the two stacks')
    for line in map(str.strip, compiled_mmcv_commands().splitlines()):
        if not line.startswith('('):
            assert line in page
    original = stack.distribution == ORIGINAL
    for package, found in stack.packages.items():
        assert all(name.startswith('onedl-') != original for name in found), package


def test_mesa_weights():
    page = (ROOT / 'docs' / 'mesa.md').read_text()
    found = re.search(r'is ([\d.]+) for MLLA-T, ([\d.]+) .* and ([\d.]+) for', page)
    for size, weight in zip('tsb', found.groups()):
        (path,) = ROOT.glob(f'configs/classification/mlla-{size}_8xb*[0-9]_in1k.py')
        text = (
            path.read_text()
            + (ROOT / 'configs/_base_/models/mlla_classifier.py').read_text()
        )
        assert float(re.search(r'mesa_weight=([\d.]+)', text)[1]) == float(weight)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The pages in HTML; building them fails at the first kind of warning."""
    out = tmp_path_factory.mktemp('docs')
    command = [
        *(sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q'),
        *('-b', 'html', '-d', out / 'doctrees', ROOT / 'docs', out / 'html'),
    ]
    result = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    return out / 'html'


def test_build(built):
    pages = {path.stem for path in built.glob('*.html')}
    assert pages >= {path.stem for path in PAGES}


def test_results_are_the_metafiles(built):
    from mlla_mm.evaluation.published import published_models

    page = (built / 'results.html').read_text()
    rows = re.findall(r'<tr.*?</tr>', page, re.S)
    for model in published_models().values():
        (row,) = (row for row in rows if f'{model.name}</span>' in row)
        cells = [
            re.sub('<.*?>', '', cell).strip()
            for cell in re.findall(r'<td.*?</td>', row, re.S)
        ]
        assert cells[1] == f'{model.parameters / 1e6:.1f} M'
        figures = [float(x) for x in cells[3:] if re.fullmatch(r'[\d.]+', x)]
        assert figures == list(model.metrics.values())
    assert '{{' not in page


def test_python_of_the_inference_page(tmp_path, digits_coco, monkeypatch, capsys):
    """Its examples run, with weights of a model that has learnt nothing."""
    pytest.importorskip('mmdet')
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'digits_coco').symlink_to(digits_coco)
    weights = checkpoints.official_classifier('t')
    torch.save(dict(model=weights), tmp_path / 'data' / 'MLLA_T.pth')
    work_dir = tmp_path / 'work_dirs' / 'mask-rcnn_mlla-nano_fpn_digits'
    work_dir.mkdir(parents=True)
    nano.save('mmdet', work_dir / 'epoch_4.pth')
    monkeypatch.chdir(tmp_path)

    variables = {}
    code = blocks((ROOT / 'docs' / 'inference.md').read_text(), 'python')
    for block in code:
        exec(block, variables)
    assert len(variables['results']) == 5
    assert len(list((tmp_path / 'results' / 'drawn').iterdir())) == 5
    assert variables['logits'].shape == (1, 1000)
    assert [x.shape[-1] for x in variables['features']] == [28, 14, 7]
    assert variables['classifier'].head.fc.out_features == 10


def test_notebook_has_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            assert cell['outputs'] == []
            assert cell['execution_count'] is None
    assert not notebook['metadata'].get('widgets')


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch):
    """The notebook runs from beginning to end, and the digits are learnt."""
    import nbformat
    from nbclient import NotebookClient

    # What it writes goes beside what it reads.
    (tmp_path / 'demo').mkdir()
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=1200, resources=dict(metadata=dict(path=tmp_path / 'demo'))
    )
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get('outputs', [])]
    pictures = [o for o in outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) == 4
    texts = [o.data['text/plain'] for o in outputs if 'data' in o]
    (metrics,) = (text for text in texts if 'accuracy/top1' in text)
    assert ast.literal_eval(metrics)['accuracy/top1'] > 60
