# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Make an archive of a folder of images, for file systems that many files slow down.

FOLDER.tar takes the folder's place in a config: docs/data_speed.md. What is complete is
left as it is, so an interrupted command can be repeated.
"""

import argparse
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'paths',
        nargs='+',
        metavar='FOLDER',
        help='folder, e.g. data/imagenet/train; or a .tar file that is there already, '
        'which gets its index alone',
    )
    parser.add_argument(
        '--out', metavar='DIR', help='folder for the archives (beside each FOLDER)'
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    from mlla_mm.checks.source import progress
    from mlla_mm.datasets.archives import folder_files, write_archive, write_index
    from mlla_mm.engine.launch import exit_on_user_error
    from mlla_mm.utils.archives import SUFFIX, ArchiveError, locate

    with exit_on_user_error():
        for text in args.paths:
            path = Path(text)
            archive = path
            if path.suffix != SUFFIX:
                out = Path(args.out) if args.out else path.parent
                archive = out / f'{path.name}{SUFFIX}'
            if archive.exists():
                print(f'{archive} is already there.')
            elif archive != path:
                names = folder_files(path)
                shown = progress(names, f'Writing {archive}', len(names))
                write_archive(path, shown, archive)
            try:
                complete = locate(archive) is not None
            except ArchiveError:
                complete = False
            if not complete:
                print(f'{archive}: {write_index(archive):,} files.')


if __name__ == '__main__':
    main()
