# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What pyproject.toml cannot say: pins from a Python file, and files for MIM."""

import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Importing the package would import PyTorch.
PINS = runpy.run_path(str(ROOT / 'mlla_mm' / 'compat' / 'versions.py'))


class BuildWithTools(build_py):
    """Put configs, tools and what they need into the package as ``.mim``, for MIM.

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
        of_clones = (
            'quickstart.sh', 'run_tests.sh', 'test_matrix.sh', 'setup_env.sh',
            'install_packages.py', 'gpu',
        )  # fmt: skip
        ignored = shutil.ignore_patterns('__pycache__', *of_clones)
        for folder in ('configs', 'tools', 'benchmarks'):
            shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
        shutil.copy2(ROOT / 'model-index.yml', target)


setup(
    cmdclass={'build_py': BuildWithTools},
    # pyproject.toml writes it in one way before setuptools 77, in another after.
    license='Apache-2.0',
    # mmengine, mmcv and the rest come from one of two sets of distributions with the
    # same import names, so neither is required here: choose an extra.
    install_requires=PINS['RUNTIME'],
    extras_require=PINS['EXTRAS'],
)
