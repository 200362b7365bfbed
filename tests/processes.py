# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The tools on several CPU processes, started faster than by torchrun."""

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What takes most of the time of a short run.
_IMPORTED = ['mlla_mm', 'mmdet.apis', 'mmseg.apis', 'mmpretrain.apis', __name__]
_LIMIT = 600  # seconds


def run_processes(tool: str, *arguments, processes: int, log: Path) -> None:
    """Run a tool to its end; one process has no launcher.

    They are forked from a process that has imported the packages, once for all runs.

    Args:
        tool (str): File name in tools/.
        *arguments: Of the command line.
        processes (int): Number of processes.
        log (Path): Where their output goes.

    Raises:
        AssertionError: If one of them fails or takes too long; ends with the output.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_IMPORTED)
    command = [tool, *map(str, arguments)]
    if processes > 1:
        command += ['--launcher', 'pytorch']
    port = _free_port()
    running = [
        context.Process(target=_run, args=(command, rank, processes, port, log))
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    while any(process.exitcode is None for process in running):
        ended = wait([p.sentinel for p in running if p.exitcode is None], _LIMIT)
        if not ended or any(process.exitcode for process in running):
            codes = [process.exitcode for process in running]
            for process in running:
                process.kill()
            # None: was still running.
            raise AssertionError(f'exit codes {codes}: {log.read_text()[-4000:]}')


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('', 0))
        return free.getsockname()[1]


def _run(command: list, rank: int, processes: int, port: int, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
    )
    os.chdir(ROOT)
    tool, *arguments = command
    sys.argv = [str(ROOT / 'tools' / tool), *arguments]
    runpy.run_path(sys.argv[0], run_name='__main__')
