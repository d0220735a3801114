# Sourced by launch/quickstart and tests/run: a virtual environment that holds this checkout, made at most once.
#
#   prepare_venv EXTRAS    makes or completes $STORM_VENV (default <checkout>/.venv), installs -e .[EXTRAS], puts it
#                          first on PATH. A stamp written last says what is installed; while setup.cfg,
#                          pyproject.toml, Python and checkout stay the same, a second call only reads it.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() { printf '%s: %s\n' "$0" "$1" >&2; exit 1; }

find_python() { # sets $python: $PYTHON where given, else the first of python3, ... that is 3.11 or newer
  local known="python3 python3.13 python3.12 python3.11"
  for python in ${PYTHON:-$known}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
  done
  die "no Python 3.11 or newer among: ${PYTHON:-$known}. Install one (Debian 12: apt-get install python3 python3-venv) or name it:
  PYTHON=/path/to/python3.12 $0"
}

make_venv() { # a folder that is no virtual environment is never cleared
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python lacks the module venv. Debian and Ubuntu: apt-get install python3-venv"
  [ -f "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] ||
    die "$venv is not empty and no virtual environment: name another folder with STORM_VENV"
  mkdir -p "$venv"
  # 7 GB with the CUDA build of torch, and the downloads; 2.6 GB with a CPU build from an index or constraint of the user.
  local need_gb=10 free_gb
  [ -z "${PIP_CONSTRAINT:-}${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ] || need_gb=3
  free_gb=$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free_gb" -ge "$need_gb" ] ||
    die "$venv: $free_gb GB free, about $need_gb GB needed. Free some, or STORM_VENV=/a/larger/disk/venv $0"
  "$python" -m venv --clear "$venv"
}

prepare_venv() {
  local extras=$1 venv=${STORM_VENV:-$repo/.venv} python key stamp
  find_python
  case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
  stamp=$venv/storm.stamp
  key=$({ cat "$repo/setup.cfg" "$repo/pyproject.toml"; "$python" -VV; echo "$repo"; } | sha256sum | cut -c 1-64)
  if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$key" ]; then
    rm -f "$stamp"
    [ "$("$venv/bin/python" -m pip --version 2>/dev/null | grep -o '(python .*')" = \
      "$("$python" -c 'import sys; print("(python %d.%d)" % sys.version_info[:2])')" ] || make_venv
  fi
  if ! grep -qxF -- "$extras" "$stamp" 2>/dev/null; then
    printf 'Installing storm-tissue[%s] into %s (the first time: 2 to 20 minutes, in which pip is silent)\n' "$extras" "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$repo[$extras]" ||
      die "the installation failed (see above); the same command continues it"
    printf '%s\n' "$key" "$extras" "$(tail -n +2 "$stamp" 2>/dev/null)" > "$stamp.new"
    mv "$stamp.new" "$stamp"
  fi
  unset PYTHONHOME
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
}
