#!/usr/bin/env bash
# Collect what a GPU machine without a package index needs besides PyTorch.
# Usage: benchmarks/gpu/prepare.sh [REPO]
# Makes REPO/.gpu/wheels (default: of this repository), which git ignores: wheels for
# Python 3.12 on x86-64, some 15 MiB. Takes a minute, and needs pip and an index.
# Environment: PYTHON=python3
set -euo pipefail

REPO=$(cd "${1:-$(dirname "${BASH_SOURCE[0]}")/../..}" && pwd)
PYTHON=${PYTHON:-python3}
WHEELS=$REPO/.gpu/wheels

if [ ! -f "$REPO/mlla_mm/__init__.py" ]; then
    echo "Error: $REPO is no clone of mlla_mm." >&2
    exit 2
fi

# The maintained fork, and what its packages import, but for PyTorch, NumPy, SciPy,
# pandas, scikit-learn, Matplotlib, OpenCV and pytest.
fork=$("$PYTHON" - "$REPO" <<'PYTHON'
import runpy
import sys

pins = runpy.run_path(f'{sys.argv[1]}/mlla_mm/compat/versions.py')
print(*(f'{name}=={version}' for name, version in pins['FORK'].values()))
PYTHON
)
read -ra BUILT <<<"$fork"
# Pure Python, but without wheels in the index, as most of the fork.
BUILT+=(
    imaug==0.4.3
    imagecorruptions-imaug==1.1.5
)
DOWNLOADED=(
    addict==2.4.0
    ftfy==6.3.1
    importlib-metadata==10.2.0
    mat4py==0.6.0
    model-index==0.1.11
    modelindex==0.0.2
    ordered-set==4.1.0
    platformdirs
    prettytable==3.18.0
    pycocotools==2.0.11
    shapely==2.1.2
    termcolor==3.3.0
    terminaltables==3.1.10
    wcwidth==0.9.4
    yapf==0.43.0
)
PLATFORMS=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 \
    manylinux2014 manylinux1; do
    PLATFORMS+=(--platform "${platform}_x86_64")
done

mkdir -p "$WHEELS"
rm -f "$WHEELS"/*.whl
# An isolated build does not see PyTorch, so mmcv gets no compiled ops and fits every
# Python; mlla_mm brings the ops that it needs.
env -u MMCV_WITH_OPS "$PYTHON" -m pip wheel -q --no-deps -w "$WHEELS" "${BUILT[@]}"
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${PLATFORMS[@]}" -d "$WHEELS" "${DOWNLOADED[@]}"

wrong=$(find "$WHEELS" -name '*.whl' -printf '%f\n' |
    grep -vE -- '-(py3|py2\.py3|cp312)-' |
    grep -vE -- '-cp3(8|9|10|11)-abi3-' || true)
if [ -n "$wrong" ]; then
    echo "Error: not for Python 3.12: $wrong" >&2
    exit 1
fi
count=$(find "$WHEELS" -name '*.whl' | wc -l)
echo "$WHEELS: $count wheels, $(du -sm "$WHEELS" | cut -f1) MiB"
