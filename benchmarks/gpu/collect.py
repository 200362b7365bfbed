# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Gather the results of run.sh in few files.

collect.py metric FOLDER NAME   print a metric of the newest evaluation in FOLDER
collect.py demos FOLDER OUT     rows of FOLDER/*.jsonl as one list in OUT/demos.json
"""

import json
import sys
from pathlib import Path


def print_metric(folder: Path, name: str) -> None:
    """Print a metric of the newest test. MMEngine writes it into TIME/TIME.json."""
    for path in sorted(folder.glob('*/*.json'), reverse=True):
        for line in reversed(path.read_text().splitlines()):
            metrics = json.loads(line)
            if name in metrics:
                print(f'{metrics[name]:.4f}')
                return


def merge_demos(folder: Path, out: Path) -> None:
    """Write the rows of all demos into one file."""
    rows = [
        json.loads(line)
        for path in sorted(folder.glob('*.jsonl'))
        for line in path.read_text().splitlines()
    ]
    (out / 'demos.json').write_text(json.dumps(rows, indent=2) + '\n')


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in ('metric', 'demos'):
        sys.exit(__doc__)
    what, folder, last = sys.argv[1:]
    if what == 'metric':
        print_metric(Path(folder), last)
    else:
        merge_demos(Path(folder), Path(last))


if __name__ == '__main__':
    main()
