#!/usr/bin/env bash
# Trains with several processes on this machine, as on several hosts; process 0 prints, the others write log files.
#
#   launch/local.sh --processes=N [--devices=D] [--port=PORT] [--restarts=R] [--dry_run] -- arguments of m3ae_jax.main
#
# After a preemption (SIGTERM to one of them) or the loss of a process all are started again, at most R times (default 10);
# Ctrl-C or SIGTERM to this script ends it.
# On a CPU each process gets D virtual devices (default 1). On GPUs process I sees GPU I alone. PYTHON: the interpreter.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

processes="" devices=1 port=12355 restarts=10
read_options "processes devices port restarts" "" "$@"
need "the number of processes" "$processes" --processes=N
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes is not a number from 1"
[[ $devices =~ ^[1-9][0-9]*$ ]] || die "--devices=$devices is not a number from 1"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts is not a number from 0"
((${#main_arguments[@]})) || die "no arguments for m3ae_jax.main: give them after --, as -- --config=configs/tiny.py"

python=${PYTHON:-python}
need_program "$python"
settings=(JAX_NUM_CPU_DEVICES="$devices")
gpus=0
[[ -n $DRY_RUN ]] || ! command -v nvidia-smi >/dev/null || gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
((gpus == 0 || gpus >= processes)) || die "--processes=$processes, but there are $gpus GPUs"

children=()
asked=""
# Whatever ends this script ends all. A process that waits for a dead one does not heed SIGTERM: it is killed.
# shellcheck disable=SC2329
end_all() {
  ((${#children[@]})) || return 0
  kill -TERM "${children[@]}" 2>/dev/null || return 0
  for _ in {1..100}; do
    kill -0 "${children[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "${children[@]}" 2>/dev/null || true
}
trap end_all EXIT
trap 'asked=1; kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT

start_all() {
  local i command
  children=()
  for ((i = 0; i < processes; i++)); do
    command=(env "${settings[@]}")
    ((gpus == 0)) || command+=("CUDA_VISIBLE_DEVICES=$i")
    command+=("$python" -m m3ae_jax.main --coordinator="localhost:$port" --process_count="$processes" --process_index="$i")
    command+=("${main_arguments[@]}")
    if [[ -n $DRY_RUN ]]; then
      ((i == 0)) && quoted "${command[@]}" || echo "$(quoted "${command[@]}") > process_$i.log 2>&1"
    elif ((i == 0)); then
      "${command[@]}" &
      children+=($!)
    else
      "${command[@]}" >"process_$i.log" 2>&1 &
      children+=($!)
    fi
  done
}

# The first exit code that is not 0.
wait_for_all() {
  local status=0
  for _ in "${children[@]}"; do
    wait -n || status=$?
    ((status == 0)) || break
  done
  return "$status"
}

while true; do
  status=0
  start_all
  wait_for_all || status=$?
  [[ -z $asked ]] && ((restarts > 0)) && start_again "$status" || exit "$status"
  end_all
  wait || true
  restarts=$((restarts - 1))
  say "ended with exit code $status: it goes on from the last checkpoint ($restarts more such starts)"
done
