#!/usr/bin/env bash
# Trains on a Slurm cluster of GPU nodes: one process a GPU.
#
#   launch/slurm.sh --nodes=N --gpus=G --workdir=DIR [--name=NAME] [--partition=P] [--account=A] [--time=HH:MM:SS]
#                   [--python=.venv/bin/python] [--dry_run] -- arguments of m3ae_jax.main
#
# Prints the job's script in a dry run. A job of the same name that waits or runs is left alone. Slurm queues the job
# again after a node failed or was taken, and the job itself (at most 100 times) after its processes stopped early (exit
# code 75, as before the time limit) or one was killed; the run then goes on from its last checkpoint. 120 s before the time limit
# the processes are told to save and stop.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
cd "$here/.."

nodes="" gpus="" workdir="" name=m3ae_jax partition="" account="" time=24:00:00 python=.venv/bin/python
read_options "nodes gpus workdir name partition account time python" "" "$@"
need "the number of nodes" "$nodes" --nodes=N
need "the number of GPUs a node" "$gpus" --gpus=G
need "the run's folder, which all nodes see," "$workdir" --workdir=DIR
((${#main_arguments[@]})) || die "no arguments for m3ae_jax.main: give them after --, as -- --config=configs/large.py"

script() {
  echo "#!/usr/bin/env bash"
  echo "#SBATCH --job-name=$name"
  echo "#SBATCH --nodes=$nodes"
  echo "#SBATCH --ntasks-per-node=$gpus"
  echo "#SBATCH --gpus-per-node=$gpus"
  echo "#SBATCH --time=$time"
  [[ -z $partition ]] || echo "#SBATCH --partition=$partition"
  [[ -z $account ]] || echo "#SBATCH --account=$account"
  echo "#SBATCH --output=$name-%j.log"
  echo "#SBATCH --requeue"
  echo "#SBATCH --signal=TERM@120"
  echo "srun --kill-on-bad-exit=0 $(quoted "$python" -m m3ae_jax.main --distributed --workdir="$workdir" "${main_arguments[@]}")"
  echo "status=\$?"
  echo "if [ \$status -eq 75 ] || [ \$status -ge 128 ]; then"
  echo "  [ \${SLURM_RESTART_COUNT:-0} -ge 100 ] || scontrol requeue \$SLURM_JOB_ID"
  echo "fi"
  echo "exit \$status"
}

if [[ -n $DRY_RUN ]]; then
  quoted squeue --me --noheader --name="$name" --format=%i
  echo "sbatch <<'END'"
  script
  echo "END"
  exit 0
fi
need_program sbatch
waiting=$(squeue --me --noheader --name="$name" --format=%i) || die "squeue failed: is this a login node of the cluster?"
if [[ -n $waiting ]]; then
  say "job ${waiting%%$'\n'*} of the name $name is there already"
  exit 0
fi
script | sbatch
