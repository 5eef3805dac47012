#!/bin/sh
# Prints every version that `make` and the extras install into a fresh environment.
#   sh scripts/constraints.sh [PYTHON] > constraints.txt
# Left out: local versions ("+cpu"), pip and its tools, lilliput itself, and what torch brings only where there is CUDA.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
sh scripts/venv.sh "$work/venv" "torch==${TORCH_VERSION:-2.13.0}" "${1-}" >&2
"$work/venv/bin/python" -m pip install ".[check,dev,docs,openvino]" >&2
echo "# Made by \`make constraints\` with Python $("$work/venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'): the versions that runs are repeated with."
"$work/venv/bin/python" -m pip freeze |
    sed -E 's/\+[A-Za-z0-9._]+$//' |
    grep -E '^[A-Za-z0-9._-]+==' |
    grep -viE '^(lilliput|pip|setuptools|wheel|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)=='
