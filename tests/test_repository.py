# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The files by which a public project is found, cited and maintained."""

import re
from pathlib import Path

import pytest
import yaml

from mlla_mm import __version__
from mlla_mm.compat.versions import EXTRAS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))
FORMS = sorted((ROOT / '.github/ISSUE_TEMPLATE').glob('[0-9]*.yml'))
CITATION = yaml.safe_load((ROOT / 'CITATION.cff').read_text())


def load(path):
    return yaml.safe_load(path.read_text())


def test_newest_entry_of_the_changelog_is_this_version():
    text = (ROOT / 'CHANGELOG.md').read_text()
    entries = re.findall(r'^## (\S+) \((\d{4}-\d\d-\d\d)\)$', text, re.M)
    assert len(entries) == text.count('\n## ')
    assert entries[0] == (__version__, CITATION['date-released'])
    assert CITATION['version'] == __version__
    dates = [date for _, date in entries]
    assert dates == sorted(dates, reverse=True)


def test_citation_is_that_of_the_readme():
    paper = CITATION['preferred-citation']
    bibtex = (ROOT / 'README.md').read_text().split('```bibtex')[1].split('```')[0]
    bibtex = ' '.join(bibtex.split())
    entry = dict(re.findall(r'(\w+) ?= ?\{(.*?)\}', bibtex))
    authors = [f'{a["family-names"]}, {a["given-names"]}' for a in paper['authors']]
    assert authors == entry['author'].split(' and ')
    assert paper['title'] == entry['title']
    assert str(paper['year']) == entry['year']
    assert paper['conference']['name'] == entry['booktitle']


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.stem)
def test_workflows(path):
    workflow = load(path)
    assert workflow['permissions'] == {'contents': 'read'}
    assert workflow['concurrency']['cancel-in-progress']
    for job in workflow['jobs'].values():
        assert job['timeout-minutes'] <= 360  # where GitHub ends it
        assert (
            'matrix' not in job.get('strategy', {}) or not job['strategy']['fail-fast']
        )
        commands = ' '.join(step.get('run', '') for step in job['steps'])
        # They run what people run.
        scripts = re.findall(r'tools/\S+\.sh', commands)
        assert scripts
        for script in scripts:
            assert (ROOT / script).is_file()
        for step in job['steps']:
            if step.get('uses', '').startswith('./'):
                assert (ROOT / step['uses'] / 'action.yml').is_file()


def test_every_supported_python_is_tested():
    text = (ROOT / 'pyproject.toml').read_text()
    supported = set(re.findall(r'Python :: (3\.\d+)"', text))
    matrix = load(ROOT / '.github/workflows/tests.yml')['jobs']['tests']['strategy'][
        'matrix'
    ]
    tested = {*matrix['python'], *(job['python'] for job in matrix['include'])}
    assert tested == supported


def test_packages_are_cached_by_their_pins():
    action = load(ROOT / '.github/actions/python/action.yml')
    (cache,) = [
        step['with']
        for step in action['runs']['steps']
        if step.get('uses', '').startswith('actions/cache@')
    ]
    (pins,) = re.findall(r"hashFiles\('(.*?)'\)", cache['key'])
    assert 'torch==' in (ROOT / pins).read_text()


@pytest.mark.parametrize('path', FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    form = load(path)
    assert form['name'] and form['description']
    fields = [field for field in form['body'] if field['type'] != 'markdown']
    ids = [field['id'] for field in fields]
    assert len(set(ids)) == len(ids)
    assert all(field['attributes']['label'] for field in fields)
    asks = any('mlla_mm.utils.collect_env' in str(field) for field in fields)
    assert asks or path.stem.endswith('feature')


def test_hooks_before_commits_have_the_versions_that_they_need():
    repos = load(ROOT / '.pre-commit-config.yaml')['repos']
    hooks = {hook['id']: repo['rev'] for repo in repos for hook in repo['hooks']}
    assert all(re.fullmatch(r'v\d+\.\d+\.\d+', rev) for rev in hooks.values())
    assert hooks['ruff-check'] == hooks['ruff-format']
    # The one that the tests run.
    assert f'ruff=={hooks["ruff-check"][1:]}' in EXTRAS['tests']
