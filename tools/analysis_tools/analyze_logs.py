# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Plot values of a log or compute times: mmpretrain's tool, for all three tasks.

Of the three packages' tools this one reads any log of MMEngine,
WORK_DIR/TIME/vis_data/scalars.json:

    analyze_logs.py plot_curve LOG... --keys loss lr --out curves.png
    analyze_logs.py plot_curve LOG... --keys coco/bbox_mAP --out map.png
    analyze_logs.py cal_train_time LOG...
"""

import argparse
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=('plot_curve', 'cal_train_time'))
    parser.add_argument(
        'arguments',
        nargs=argparse.REMAINDER,
        help='logs and options; "TASK -h" lists them',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    mmpretrain = find_spec('mmpretrain')
    if mmpretrain is None or mmpretrain.origin is None:
        sys.exit('Error: this is a tool of mmpretrain, which is not installed.')
    tools = Path(mmpretrain.origin).parent / '.mim' / 'tools'
    tool = tools / 'analysis_tools' / 'analyze_logs.py'
    if not tool.is_file():
        sys.exit(f'Error: mmpretrain is installed without its tools: no {tool}')
    sys.argv = [str(tool), args.task, *args.arguments]
    runpy.run_path(str(tool), run_name='__main__')


if __name__ == '__main__':
    main()
