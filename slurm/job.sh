# What jobs share. Sourced by every *.sbatch on the node, after it has found the project:
#
#   storm_python WORDS...         python in the environment of env.sh
#   storm_tasks MODULE WORDS...   the module once for each task of this array element, with --task K; its exit code is
#                                 the highest of theirs. After a 2, words or input that are refused, there is no next
#                                 one. Without an array: once, with the words alone.
#
# An element has STORM_PER_ELEMENT tasks (1 unless slurm/submit says more) of STORM_TASKS in all.

. "$STORM_ROOT/slurm/env.sh"
export STORM_ROOT PYTHONPATH=$STORM_ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a worker is a process; --cpus-per-task of them run at a time

set +u # modules and activation scripts read variables that are not set
eval "${STORM_SETUP:-}"
set -u
[ -n "${STORM_RUN:-}" ] || command -v python >/dev/null ||
  { echo "no python on $(uname -n); name its module or environment as STORM_SETUP in slurm/env.sh" >&2; exit 2; }

storm_python() {
  ${STORM_RUN:-} python "$@" # words of a command: split on purpose
}

storm_tasks() {
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { storm_python -m "$@"; return; }
  local each=${STORM_PER_ELEMENT:-1} task code=0 worst=0
  local first=$((SLURM_ARRAY_TASK_ID * each))
  [ "$first" -lt "${STORM_TASKS:-$((first + 1))}" ] ||
    { echo "element $SLURM_ARRAY_TASK_ID has no task: $STORM_TASKS tasks, $each to an element" >&2; return 2; }
  for ((task = first; task < first + each && task < ${STORM_TASKS:-task + 1}; task++)); do
    printf '== %s: task %d on %s, start %d\n' "$1" "$task" "$(uname -n)" "$((${SLURM_RESTART_COUNT:-0} + 1))"
    storm_python -m "$@" --task "$task" && code=0 || code=$?
    [ "$code" -le "$worst" ] || worst=$code
    [ "$code" -ne 2 ] || break # words or input are refused: the next task would say the same
  done
  return "$worst"
}
