# What differs from site to site. Read by slurm/submit and, on the node, by every job (job.sh).
#
# Fill in what your cluster asks for. A variable that is set where you submit wins over its value here; so do sbatch's
# own options over both. Values are kept out of the *.sbatch files, where variables are not expanded.

site() { # NAME VALUE: export it unless it is set already or the value is empty
  [ -n "${!1:-}" ] || [ -z "$2" ] || export "$1=$2"
}

site SBATCH_ACCOUNT ""     # who pays
site SBATCH_PARTITION ""
site SBATCH_QOS ""
site SBATCH_CONSTRAINT ""
site SBATCH_RESERVATION ""

site STORM_SETUP ""        # lines before python: module load python/3.11; . "$HOME/venvs/storm/bin/activate"
site STORM_RUN ""          # what python is run by: apptainer exec --bind /data /images/storm.sif
site STORM_LOGS ""         # folder of the logs; blank: logs/ where you submit
site STORM_THROTTLE 20     # elements of an array that run at a time

if [ -n "${SLURM_JOB_ID:-}" ]; then # on a node: what is written for a while stays on its own disk
  local_folder=${SLURM_TMPDIR:-/tmp}/storm-$(id -u)
  mkdir -p -m 700 "$local_folder"
  [ -O "$local_folder" ] ||
    { echo "$local_folder belongs to another user; choose another folder in slurm/env.sh" >&2; exit 2; }
  export TMPDIR=$local_folder XDG_CACHE_HOME=$local_folder/cache MPLCONFIGDIR=$local_folder/matplotlib
  export TORCH_EXTENSIONS_DIR=$local_folder/torch TRITON_CACHE_DIR=$local_folder/triton
fi
