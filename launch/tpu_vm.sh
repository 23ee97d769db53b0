#!/usr/bin/env bash
# Trains on a Cloud TPU VM (one slice, one or many hosts).
#
#   launch/tpu_vm.sh ACTION --name=NAME --project=ID --zone=ZONE --bucket=BUCKET [options] [-- arguments of m3ae_jax.main]
#
# Actions: up (create, or use what is there), install (this checkout, on every worker), start (the run, on every
# worker), logs (of worker 0, followed), status, stop (ends the run), delete, and run: up, install, start, then watch,
# and begin again after a preemption, or when the run asks for it (exit code 75) or was killed, until it has ended.
#
# Options: --type=v5litepod-16, --version=RUNTIME, --spot, --queued (as a queued resource), --poll=SECONDS,
# --restarts=10 (of a slice that was not preempted), --dry_run.
# The bucket is mounted on every worker at ~/bucket; the run's folder is ~/bucket/runs/NAME. Everything may be repeated.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
cd "$here/.."

action=${1:-}
[[ $# -eq 0 ]] || shift
name="" project="" zone="" bucket="" type=v5litepod-16 version="" spot="" queued="" poll=60 restarts=10
read_options "name project zone bucket type version poll restarts" "spot queued" "$@"

bucket=${bucket#gs://}
bucket=${bucket%/}
if [[ -z $version ]]; then
  case $type in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) die "--type=$type: as v4-8, v5litepod-16, v5p-8 or v6e-8; for another give --version=RUNTIME too" ;;
  esac
fi

# shellcheck disable=SC2016
GCSFUSE='command -v gcsfuse > /dev/null || { set -e; curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null; echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null; sudo apt-get -q update; sudo apt-get -q install -y gcsfuse; }'

place=(--project="$project" --zone="$zone")
labels="created-by=$OWNER_LABEL"

tpu() { run gcloud compute tpus tpu-vm "$@" "${place[@]}"; }
resource() { run gcloud compute tpus queued-resources "$@" "${place[@]}"; }
on_all() { tpu ssh "$name" --worker=all --command="$1"; }

# query COMMAND...: the last line it prints; nothing if the thing does not exist. Any other failure is told and returned:
# always assign it on a line of its own (state=$(vm_state)), where `set -e` then ends the script.
query() {
  local output errors status=0
  if [[ -n $DRY_RUN ]]; then
    quoted "$@" >&2 # what follows is printed for a machine on which nothing exists yet
    return
  fi
  errors=$(mktemp)
  output=$("$@" 2>"$errors") || status=$? # gcloud tells what it does on standard error
  if ((status == 0)); then
    tail -n 1 <<<"$output"
  elif ! grep -qE "NOT_FOUND|was not found" "$errors"; then
    echo "error: gcloud failed with exit code $status: $(tail -n 1 "$errors")" >&2
    rm -f "$errors"
    return 2
  fi
  rm -f "$errors"
}

vm_state() { query gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format="value(state)"; }
vm_owner() { query gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format="value(labels.created-by)"; }
queue() { query gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format="value($1)"; }
queue_state() { queue state.state; }
queue_owner() { queue "tpu.nodeSpec[0].node.labels.created-by"; }

create() {
  local options=(--accelerator-type="$type" --labels="$labels")
  [[ -z $spot ]] || options+=(--spot)
  if [[ -n $queued ]]; then
    resource create "$name" --node-id="$name" --runtime-version="$version" "${options[@]}"
  else
    tpu create "$name" --version="$version" "${options[@]}"
  fi
}

# Deletes what these scripts made under this name; refuses anything else.
delete() {
  local state owner waiting=""
  state=$(vm_state)
  if [[ -n $state ]]; then
    owner=$(vm_owner)
    check_owner "$owner"
  fi
  if [[ -n $queued ]]; then
    waiting=$(queue_state)
    if [[ -n $waiting ]]; then
      owner=$(queue_owner)
      check_owner "$owner"
    fi
  fi
  [[ -z $state && -z $DRY_RUN ]] || tpu delete "$name" --quiet
  if [[ -n $waiting || (-n $queued && -n $DRY_RUN) ]]; then
    resource delete "$name" --quiet --force
  fi
}

check_owner() {
  [[ $1 == "$OWNER_LABEL" ]] ||
    die "$name was not created by these scripts (its label created-by is '$1'): it is not touched"
}

wait_until_ready() {
  local state waiting
  while true; do
    state=$(vm_state)
    [[ $state != READY && -z $DRY_RUN ]] || return 0
    case $state in
      PREEMPTED | TERMINATED | STOPPED) die "$name is $state before it was ready: run this again" ;;
    esac
    if [[ -n $queued ]]; then
      waiting=$(queue_state)
      case $waiting in
        FAILED | SUSPENDED | SUSPENDING) die "the queued resource $name is $waiting: run this again" ;;
      esac
    elif [[ -z $state ]]; then
      die "$name is gone: it was created and does not exist any more"
    fi
    say "$name is ${state:-waiting in the queue}; asking again in $poll s"
    sleep "$poll"
  done
}

up() {
  local state waiting="" owner
  state=$(vm_state)
  [[ -z $queued ]] || waiting=$(queue_state)
  case $waiting in
    FAILED | SUSPENDED)
      say "the queued resource $name is $waiting: it is deleted and asked for anew"
      delete
      create
      wait_until_ready
      return
      ;;
  esac
  case $state in
    READY) say "$name is there already: it is used" ;;
    PREEMPTED | TERMINATED | STOPPED)
      say "$name is $state: it is deleted and created anew"
      delete
      create
      ;;
    "")
      if [[ -n $waiting ]]; then
        owner=$(queue_owner)
        check_owner "$owner"
        say "$name is in the queue already"
      else
        create
      fi
      ;;
    *) say "$name is $state" ;;
  esac
  wait_until_ready
}

# Not under a live run: its code and packages would change beneath it.
install() {
  local archive=${TMPDIR:-/tmp}/m3ae_jax.tar.gz
  [[ -n $DRY_RUN || -z $(git status --porcelain) ]] || say "uncommitted changes are not installed"
  run git archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$name:m3ae_jax.tar.gz" --worker=all
  # The images' own Python is 3.10; uv brings a newer one.
  # shellcheck disable=SC2016
  on_all 'set -e; if [ -f ~/run.pid ] && kill -0 $(cat ~/run.pid) 2>/dev/null; then echo a run goes on: nothing is installed; exit 0; fi; mkdir -p m3ae_jax bucket; tar xzf m3ae_jax.tar.gz -C m3ae_jax; cd m3ae_jax; python3 -m pip install -q --user uv; [ -d .venv ] || ~/.local/bin/uv venv -q --python 3.12 .venv; ~/.local/bin/uv pip install -q --python .venv -e ".[tpu]"'
  on_all "$GCSFUSE"
  on_all "mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit=200000 $(quoted "$bucket") bucket"
}

start() {
  local command
  command="cd m3ae_jax && if [ -f ~/run.pid ] && kill -0 \$(cat ~/run.pid) 2>/dev/null; then echo running already; else"
  command+=" rm -f ~/run.exit ~/run.stop; (nohup .venv/bin/python -m m3ae_jax.main --distributed"
  command+=" --workdir=\$HOME/bucket/runs/$(quoted "$name") $(quoted "${main_arguments[@]}") > ~/run.log 2>&1;"
  command+=' echo $? > ~/run.exit) < /dev/null > /dev/null 2>&1 & echo $! > ~/run.pid; fi'
  on_all "$command"
}

# The run's exit code on worker 0; empty while it goes on.
exit_code() { query gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=0 --command="cat run.exit 2>/dev/null || true"; }

# Something if `stop` ended the run.
asked_to_stop() { query gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=0 --command="ls run.stop 2>/dev/null || true"; }

watch() {
  local state code asked
  [[ -z $DRY_RUN ]] || return 0
  while true; do
    sleep "$poll"
    state=$(vm_state)
    case $state in
      READY)
        code=$(exit_code) || code="" # a worker that cannot be reached is asked again
        [[ $code =~ ^[0-9]+$ ]] || continue
        if start_again "$code"; then
          asked=$(asked_to_stop)
          [[ -z $asked ]] || die "the run was stopped and saved: the same command goes on"
          ((restarts > 0)) || die "the run ended with exit code $code once more: see launch/tpu_vm.sh logs"
          restarts=$((restarts - 1))
          say "the run ended with exit code $code: it begins again from the last checkpoint"
          on_all 'pkill -KILL -f "[m]3ae_jax.main" || true; sleep 2' # what waits for a lost process
          start
          continue
        fi
        ((code == 0)) || die "the run ended with exit code $code: see launch/tpu_vm.sh logs"
        say "the run is done"
        return 0
        ;;
      PREEMPTED | TERMINATED | STOPPED | "")
        say "$name was preempted: it begins again from the last checkpoint"
        up
        install
        start
        ;;
    esac
  done
}

case $action in
  up | install | start | logs | status | stop | delete | run) ;;
  "") die "no action: up, install, start, logs, status, stop, delete or run" ;;
  *) die "unknown action '$action': up, install, start, logs, status, stop, delete or run" ;;
esac
need "the name" "$name" --name=NAME
need "the project" "$project" --project=ID
need "the zone" "$zone" --zone=ZONE
case $action in
  install | start | run) need "the bucket" "$bucket" --bucket=BUCKET ;;
esac
case $action in
  start | run) ((${#main_arguments[@]})) || die "no arguments for m3ae_jax.main: give them after --, as -- --config=configs/large.py" ;;
esac
need_program gcloud

case $action in
  up) up ;;
  install) install ;;
  start) start ;;
  logs) tpu ssh "$name" --worker=0 --command="tail -n 100 -F run.log" ;;
  status)
    tpu describe "$name"
    [[ -z $queued ]] || resource describe "$name"
    ;;
  stop) on_all 'touch ~/run.stop; if [ -f ~/run.pid ]; then pkill -TERM -f "[m]3ae_jax.main" || true; fi' ;;
  delete) delete ;;
  run)
    up
    install
    start
    watch
    ;;
esac
