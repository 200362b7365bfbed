# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def requirements(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def version():
    scope = {}
    exec((ROOT / 'mlla_mm' / 'version.py').read_text(), scope)
    return scope['__version__']


class BuildWithTools(build_py):
    """Put configs and tools into the package as ``.mim``, where MIM looks for them.

    Straight into the folder that becomes the wheel: the source tree stays as it is. An
    editable installation has the source tree itself.
    """

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):  # setuptools before 64 has none
            return
        target = Path(self.build_lib) / 'mlla_mm' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        # What sets up a clone has nothing to do in an installation.
        of_clones = ('quickstart.sh', 'run_tests.sh', 'test_matrix.sh', 'setup_env.sh')
        ignored = shutil.ignore_patterns('__pycache__', *of_clones)
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
        shutil.copy2(ROOT / 'model-index.yml', target)


setup(
    name='mlla_mm',
    version=version(),
    description='MLLA (Mamba-Like Linear Attention) for OpenMMLab: detection, '
    'segmentation and classification',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    cmdclass={'build_py': BuildWithTools},
    packages=find_packages(include=['mlla_mm', 'mlla_mm.*']),
    # mmengine, mmcv and the rest come from one of two sets of distributions with the
    # same import names, so neither is required here: choose an extra.
    install_requires=requirements('runtime'),
    extras_require={
        name: requirements(name)
        for name in ('onedl', 'openmmlab', 'tests', 'docs', 'export')
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
