# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Plot values of a log or compute times: mmpretrain's tool, for all three tasks.

It is the one of the three packages' tools that reads any log of MMEngine's,
``WORK_DIR/TIME/vis_data/scalars.json``::

    analyze_logs.py plot_curve LOG... --keys loss lr --out curves.png
    analyze_logs.py plot_curve LOG... --keys coco/bbox_mAP --out map.png
    analyze_logs.py cal_train_time LOG...
"""

import runpy
import sys
from pathlib import Path

import mmpretrain


def main() -> None:
    tools = Path(mmpretrain.__file__).parent / '.mim' / 'tools'
    tool = tools / 'analysis_tools' / 'analyze_logs.py'
    if not tool.is_file():
        sys.exit(f'Error: mmpretrain is installed without its tools: no {tool}')
    runpy.run_path(str(tool), run_name='__main__')


if __name__ == '__main__':
    main()
