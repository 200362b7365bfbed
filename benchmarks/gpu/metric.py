# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Print a metric of the newest test in a work_dir: metric.py WORK_DIR NAME."""

import json
import sys
from pathlib import Path


def main() -> None:
    """MMEngine writes the metrics of a test into TIME/TIME.json."""
    folder, name = sys.argv[1:]
    for path in sorted(Path(folder).glob('*/*.json'), reverse=True):
        for line in reversed(path.read_text().splitlines()):
            metrics = json.loads(line)
            if name in metrics:
                print(f'{metrics[name]:.4f}')
                return


if __name__ == '__main__':
    main()
