# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Runs of the tools, which mostly take less time than the imports of a new process."""

import importlib.util
import ipaddress
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Optional
from unittest import mock

import cv2
import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope

from mlla_mm.checkpoints.reader import checkpoints_are_trusted, trust_checkpoints

ROOT = Path(__file__).parents[1]
# What the tools spend most of a short run on.
_IMPORTED = [
    *('mlla_mm', 'mmdet.apis', 'mmseg.apis', 'mmpretrain.apis'),
    *('mlla_mm.apis.test', 'mlla_mm.apis.train', __name__, 'tests.quick'),
]
_LIMIT = 600  # seconds
_CONSOLE = 'mlla_mm.engine.console'


def fill_once(folder: Path, fill) -> Path:
    """Call ``fill`` with a folder, unless a process did; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix('.lock')):
        if not folder.with_suffix('.filled').exists():
            fill(folder)
            folder.with_suffix('.filled').touch()
    return folder


def call_tool(
    capsys, tool, *arguments, check=True, cwd=ROOT
) -> subprocess.CompletedProcess:
    """Call the ``main`` of a tool in this process, which is then as it was.

    Args:
        capsys: The fixture of pytest.
        tool (str): Path of the tool in the repository.
        *arguments: Those of the tool.
        check (bool): Whether an exit status other than 0 fails the test.
        cwd (Path): Where to run it.

    Returns:
        The exit status of a process, and what it would print in ``stdout`` and in
        ``stderr``, where a ``SystemExit`` writes its message.
    """
    words = [str(word) for word in arguments]
    capsys.readouterr()
    with restored_state(), mock.patch('sys.argv', [tool, *words]):
        os.chdir(cwd)
        sys.path.insert(0, str(ROOT / 'tools'))
        status = 0
        try:
            load_tool(tool).main(words)
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    out, err = capsys.readouterr()
    assert status == 0 or not check, (out + err)[-4000:]
    return subprocess.CompletedProcess([tool, *words], status, out, err)


def load_tool(path: str):
    """The module of a tool, from its path in the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def restored_state():
    """What tools change in the process that is theirs alone."""
    scopes = dict(DefaultScope._instance_dict)
    trusted, cwd = checkpoints_are_trusted(), os.getcwd()
    threads = torch.get_num_threads(), cv2.getNumThreads()
    states = random.getstate(), np.random.get_state()
    handler = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(mock.patch.dict(os.environ))
        for name in ('path', 'meta_path'):
            stack.enter_context(mock.patch.object(sys, name, [*getattr(sys, name)]))
        try:
            yield
        finally:
            # Where quiet() puts another print, which hides the built-in one.
            for module in list(sys.modules.values()):
                shown = getattr(module, '__dict__', {}).get('print')
                if getattr(shown, '__module__', '') == _CONSOLE:
                    del module.print
            DefaultScope._instance_dict.clear()
            DefaultScope._instance_dict.update(scopes)
            # Their handlers write to what is captured now.
            MMLogger._instance_dict.clear()
            MessageHub._instance_dict.clear()
            signal.signal(signal.SIGTERM, handler)
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads(threads[0])
            cv2.setNumThreads(threads[1])
            trust_checkpoints(trusted)
            os.chdir(cwd)


def run_tool(
    *command, check=True, env=None, cwd=ROOT, processes=None, separate=False
) -> subprocess.CompletedProcess:
    """Run a tool of the repository, or any command, to its end.

    ``python`` with the path of a script runs that script in a process that is forked
    from one with all packages imported, unless variables are given, which a package may
    read when it is imported. Other commands are run as they are.

    Args:
        *command: The words.
        check (bool): Whether an exit status other than 0 fails the test.
        env (dict, optional): Variables besides those of this process.
        cwd (Path): Where to run it.
        processes (int, optional): Number of processes for a script, each with the
            variables that torchrun would set. Default: one without them.
        separate (bool): Whether ``stderr`` of the result has what was printed there.

    Returns:
        The exit status (that of one that failed, if any), and in ``stdout`` all that
        was printed, errors included unless they are separate.
    """
    words = [str(word) for word in command]
    environment = {
        **os.environ,
        # The launchers call 'python'; it has to be the one that runs the tests.
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
        # Two processes need two GPUs, or none.
        'CUDA_VISIBLE_DEVICES': '',
        **(env or {}),
    }
    if words[0] == 'python' and words[1][0] != '-' and not env:
        result = _fork(words[1:], environment, cwd, processes, separate)
    else:
        assert processes is None, 'only scripts are run in several processes'
        result = subprocess.run(
            words, cwd=cwd, env=environment, text=True, timeout=_LIMIT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if separate else subprocess.STDOUT,
        )  # fmt: skip
    if check:
        printed = result.stdout + (result.stderr or '')
        assert result.returncode == 0, printed[-4000:]
    return result


def _fork(script, environment, cwd, processes, separate) -> subprocess.CompletedProcess:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_IMPORTED)
    with _log() as out, _log() as err:
        logs = (out.name, err.name if separate else out.name)
        running = [
            context.Process(target=_run, args=(script, variables, cwd, logs))
            for variables in _environments(environment, processes)
        ]
        # The first one also starts the process with the imports, which finds them by
        # PYTHONPATH, and is to find no GPU.
        with mock.patch.dict(os.environ, environment):
            for process in running:
                process.start()
        _wait(running, out)
        codes = [process.exitcode for process in running]
        # One that failed by itself, rather than the others, which were killed for it.
        status = next((code for code in codes if code > 0), min(codes))
        return subprocess.CompletedProcess(script, status, out.read(), err.read())


def _log():
    return tempfile.NamedTemporaryFile('r', errors='replace')


def free_port() -> int:
    """A port that nobody has, below those that the system gives to connections.

    A process that tries to connect to one of those before the other listens there may
    get it itself, and then is connected to itself.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as free, suppress(OSError):
            free.bind(('', port))
            return port


def listening(pid: int) -> set:
    """The IP addresses at which a process and those that it has started listen."""
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it ends
            parents[int(stat.parent.name)] = int(
                stat.read_text().split(')')[-1].split()[1]
            )
    family = {pid}
    while not family.issuperset(more := {p for p in parents if parents[p] in family}):
        family |= more
    sockets = set()
    for path in (path for p in family for path in Path(f'/proc/{p}/fd').iterdir()):
        with suppress(OSError):
            sockets.add(os.readlink(path))
    addresses = set()
    for table in Path('/proc/net').glob('tcp*'):
        for line in table.read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == '0A' and f'socket:[{inode}]' in sockets:
                words = bytes.fromhex(address.split(':')[0])
                found = b''.join(
                    words[i : i + 4][::-1] for i in range(0, len(words), 4)
                )
                addresses.add(str(ipaddress.ip_address(found)))
    return addresses


def _environments(environment: dict, processes: Optional[int]) -> list:
    """The environment of each process."""
    if processes is None:
        return [environment]
    port = free_port()
    return [
        dict(
            environment, RANK=str(rank), WORLD_SIZE=str(processes),
            LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
        )
        for rank in range(processes)
    ]  # fmt: skip


def _wait(running: list, log) -> None:
    """Until all have ended; one that failed takes the others with it after a while."""
    # exitcode asks the system, so it may change from one line to the next.
    while ends := [process.sentinel for process in running if process.exitcode is None]:
        limit = 30 if any(process.exitcode for process in running) else _LIMIT
        if not wait(ends, limit):
            for process in running:
                process.kill()
                process.join()
            if limit == _LIMIT:
                raise AssertionError(f'no end after {limit} s: {log.read()[-4000:]}')


def _run(script: list, environment: dict, cwd: Path, logs: tuple) -> None:
    for stream, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    os.chdir(cwd)
    sys.argv = script
    sys.path.insert(0, str(Path(script[0]).resolve().parent))
    runpy.run_path(script[0], run_name='__main__')
