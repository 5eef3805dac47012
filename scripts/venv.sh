#!/bin/sh
# Makes the virtual environment VENV with torch in it, and names what is missing with its install line.
#   sh scripts/venv.sh VENV [TORCH] [PYTHON]
# TORCH is what pip installs ("torch==2.12.0"); empty keeps the torch that VENV or PYTHON already has.
set -eu
venv=$1 torch=${2-} python=${3-}

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
if [ -z "$python" ]; then
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c "$supported" >/dev/null 2>&1; then python=$name && break; fi
    done
fi
if ! "${python:-python3}" -c "$supported" >/dev/null 2>&1; then
    cat >&2 <<MISSING
lilliput needs Python 3.11 to 3.14; ${python:-python3} is missing or another version. Install it:
    Debian, Ubuntu    sudo apt-get install python3 python3-venv
    macOS             brew install python@3.14
or name one that you have: make demo PYTHON=/path/to/python3.12
MISSING
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    cat >&2 <<MISSING
lilliput needs Python's venv module, which $python has not. Install it:
    Debian, Ubuntu    sudo apt-get install python3-venv    (for a Python that is not the system's own: python$version-venv)
MISSING
    exit 1
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if [ -n "$torch" ]; then
    # First and alone: the largest download, and the one that a user may want to choose. Unquoted: it may hold options.
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install $torch
elif ! "$venv/bin/python" -c 'import torch' >/dev/null 2>&1; then
    where=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' 2>/dev/null) || {
        echo "TORCH= keeps the torch that you have, but neither $venv nor $python has one. Leave TORCH= out, or install torch there." >&2
        exit 1
    }
    "$venv/bin/python" - "$where" <<'LINK'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "own_torch.pth").write_text(sys.argv[1] + "\n")
LINK
fi
"$venv/bin/python" -W ignore -c 'import torch; print("torch", torch.__version__, "from", torch.__file__)'
