# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Prints what a bug report needs, and what is wrong with the installation.

Run ``python -m mlla_mm.utils.collect_env``. The exit status is 1 if there are problems.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import Dict, List

from ..compat.imports import find_import_failures
from ..compat.stack import Stack, collect_stack, find_problems
from ..version import __version__

# Import nothing else here: it may be broken.

_NOT_INSTALLED = 'not installed'
_BROKEN = 'does not import'
#: What training, testing and inference import.
_RUNS_IMPORT = (
    *('mlla_mm', 'mmengine.runner', 'mmcv.ops', 'mmcv.transforms'),
    *('mmdet.apis', 'mmseg.apis', 'mmpretrain.apis'),
)
_LIBRARIES = {
    'PyTorch': 'torch',
    'torchvision': 'torchvision',
    'NumPy': 'numpy',
    'OpenCV': 'cv2',
}
_TF32_ENV = ('NVIDIA_TF32_OVERRIDE', 'TORCH_ALLOW_TF32_CUBLAS_OVERRIDE')


def main() -> int:
    """Print the report.

    Returns:
        int: Exit status, 1 where there are problems.
    """
    # Without PyTorch nothing imports, and another problem says so.
    modules = _RUNS_IMPORT if find_spec('torch') else ()
    with ThreadPoolExecutor(1) as pool:
        failures = pool.submit(find_import_failures, modules)
        stack = collect_stack()
        table = format_table(collect_env(stack))
        stack.failures = failures.result()
    problems = find_problems(stack)
    print(f'{table}\n\n{format_problems(problems)}')
    return int(bool(problems))


def collect_env(stack: Stack) -> Dict[str, str]:
    """Describe the running environment.

    Args:
        stack (Stack): The installed packages.

    Returns:
        dict[str, str]: Values by label, in the order to print.
    """
    rows = {
        'mlla_mm': __version__,
        'Platform': platform.platform(),
        'Python': platform.python_version(),
    }
    for label, name in _LIBRARIES.items():
        rows[label] = stack.versions.get(name, _BROKEN)
    for package, found in stack.packages.items():
        texts = [f'{version} ({name})' for name, version in found.items()]
        rows[package] = ' and '.join(texts) or _NOT_INSTALLED
    rows['mmcv ops'] = _ops_row(stack)
    if 'torch' in stack.versions:
        rows.update(_device_rows())
    if stack.packages['mmengine'] and 'torch' in stack.versions:
        rows.update(_compiler_rows())
    return rows


def format_table(rows: Dict[str, str]) -> str:
    """Write labels and values in two aligned columns.

    Args:
        rows (dict[str, str]): Values by label.

    Returns:
        str: One line per row.
    """
    width = max(map(len, rows))
    return '\n'.join(f'{label:<{width}}  {value}' for label, value in rows.items())


def format_problems(problems: List[str]) -> str:
    """Number the problems.

    Args:
        problems (list[str]): As from :func:`mlla_mm.compat.stack.find_problems`.

    Returns:
        str: The numbered problems, or 'No problem found.'.
    """
    if not problems:
        return 'No problem found.'
    numbered = (f'{i}. {text}' for i, text in enumerate(problems, 1))
    return 'Problems found:\n\n' + '\n\n'.join(numbered)


def _ops_row(stack: Stack) -> str:
    if not stack.packages['mmcv']:
        return _NOT_INSTALLED
    try:
        from ..compat import mmcv_ext

        if mmcv_ext.install():
            return "stand-in on torchvision's kernels (no compiled ops that load)"
        ext = import_module('mmcv._ext')
        compiler, cuda = ext.get_compiler_version(), ext.get_compiling_cuda_version()
        return f'compiled ({compiler}, CUDA {cuda})'
    except Exception:  # find_problems says why
        return _BROKEN


def _device_rows() -> Dict[str, str]:
    """Devices and threads that PyTorch uses."""
    import torch

    rows = {
        'CPU': f'{os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads, '
        f'OMP_NUM_THREADS={os.environ.get("OMP_NUM_THREADS", "not set")}'
    }
    built_for = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        rows['CUDA'] = f'not available (PyTorch was built for: {built_for or "CPU"})'
        return rows
    rows['CUDA'] = f'available (PyTorch was built for {built_for})'
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows[f'GPU {index}'] = (
            f'{device.name}, capability {device.major}.{device.minor}, '
            f'{device.total_memory / 2**30:.0f} GiB'
        )
    rows['TF32'] = _tf32_row()
    rows['cuDNN'] = str(torch.backends.cudnn.version())
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        rows['NCCL'] = '.'.join(map(str, torch.cuda.nccl.version()))
    return rows


def _tf32_row() -> str:
    """What float32 is computed in on the GPUs, and the variables that decide it."""
    from ..compat.pytorch import convolutions_use_tf32, products_use_tf32

    used = {'products': products_use_tf32(), 'convolutions': convolutions_use_tf32()}
    texts = [f'{kind} {"yes" if uses else "no"}' for kind, uses in used.items()]
    texts += [f'{name}={os.environ[name]}' for name in _TF32_ENV if name in os.environ]
    return ', '.join(texts)


def _compiler_rows() -> Dict[str, str]:
    """The compilers that MMEngine finds. They are needed to compile mmcv."""
    try:
        from mmengine.utils.dl_utils import collect_env as mmengine_collect_env

        found = mmengine_collect_env()
    except Exception:  # find_problems says why
        return {}
    labels = ('GCC', 'MSVC', 'CUDA_HOME', 'NVCC')
    return {label: str(found[label]) for label in labels if label in found}


if __name__ == '__main__':
    sys.exit(main())
