# Sourced by the other scripts: makes .venv at the repository's root if need be, installs requirements.txt into it
# once, and activates it.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
base_python="${PYTHON:-python3}"
if [ ! -x "$root/.venv/bin/python" ]; then
    "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or later is needed, and $base_python is $("$base_python" --version 2>&1); set PYTHON=…" >&2
        exit 2
    }
    echo "making .venv"
    "$base_python" -m venv --clear "$root/.venv" || exit 1  # of an older one, what is left may not fit
fi
if ! [ "$(. "$root/.venv/bin/activate" && dirname "$(command -v python)")" -ef "$root/.venv/bin" ]; then  # it was moved
    "$root/.venv/bin/python" -m venv "$root/.venv"
    # What pip installed names the old place in its first line or, if that has a space, in its second.
    { grep -lIE "^(#!|'''exec' ).*/bin/python" "$root"/.venv/bin/* || true; } | while read -r script; do
        sed -i -e '1s|^#!.*/bin/python.*|#!/usr/bin/env python|' \
            -e "2s|^'''exec' .*|'''exec' python \"\$0\" \"\$@\"|" "$script"
    done
fi
if ! cmp -s "$root/requirements.txt" "$root/.venv/installed.txt"; then
    echo "installing requirements.txt into .venv (a few minutes, once)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" &&
        cp "$root/requirements.txt" "$root/.venv/installed.txt" || exit 1
fi
source "$root/.venv/bin/activate"
