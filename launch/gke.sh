#!/usr/bin/env bash
# Trains on Google Kubernetes Engine: a JobSet over one or several TPU slices.
#
#   launch/gke.sh ACTION --name=NAME --image=IMAGE --bucket=BUCKET [options] [-- arguments of m3ae_jax.main]
#
# Actions: start (apply the manifest), logs (of the first pod, followed), status, delete.
# Options: --accelerator=tpu-v5-lite-podslice, --topology=4x4, --chips_per_host=4, --slices=1, --restarts=10,
# --service_account=default, --namespace=default, --dry_run (prints the manifest and the commands).
# Needs kubectl, set to a cluster that has the JobSet controller and the Cloud Storage FUSE driver. The bucket is
# mounted at /bucket; the run's folder is /bucket/runs/NAME. A preempted slice is started again by the controller.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

action=${1:-}
[[ $# -eq 0 ]] || shift
name="" image="" bucket="" accelerator=tpu-v5-lite-podslice topology=4x4 chips_per_host=4 slices=1 restarts=10
service_account=default namespace=default
read_options "name image bucket accelerator topology chips_per_host slices restarts service_account namespace" "" "$@"
bucket=${bucket#gs://}
bucket=${bucket%/}

case $action in
  start | logs | status | delete) ;;
  "") die "no action: start, logs, status or delete" ;;
  *) die "unknown action '$action': start, logs, status or delete" ;;
esac
need "the name" "$name" --name=NAME
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name=$name: lower-case letters, digits and '-', as Kubernetes wants"
if [[ $action == start ]]; then
  need "the image" "$image" --image=IMAGE
  need "the bucket" "$bucket" --bucket=BUCKET
  [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || die "--topology=$topology: as 4x4 or 2x2x4"
  ((${#main_arguments[@]})) || die "no arguments for m3ae_jax.main: give them after --, as -- --config=configs/large.py"
fi
need_program kubectl

chips=$((${topology//x/*}))
hosts=$((chips / chips_per_host))
((hosts > 0)) || hosts=1
((hosts > 1)) || chips_per_host=$chips

# yaml_list WORD...: JSON strings, which YAML reads too.
yaml_list() {
  local word line=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    line+="\"${word//\"/\\\"}\", "
  done
  echo "[${line%, }]"
}

manifest() {
  local list line
  list=$(yaml_list --distributed --workdir="/bucket/runs/$name" "${main_arguments[@]}")
  sed -e "s|NAMESPACE|$namespace|g" -e "s|NAME|$name|g" -e "s|OWNER|$OWNER_LABEL|g" -e "s|IMAGE|$image|g" \
    -e "s|BUCKET|$bucket|g" -e "s|ACCELERATOR|$accelerator|g" -e "s|TOPOLOGY|$topology|g" -e "s|HOSTS|$hosts|g" \
    -e "s|CHIPS|$chips_per_host|g" -e "s|SLICES|$slices|g" -e "s|RESTARTS|$restarts|g" \
    -e "s|SERVICE_ACCOUNT|$service_account|g" "$here/jobset.yaml" | while IFS= read -r line; do
    # The arguments last: they may hold any character.
    echo "${line/ARGUMENTS/"$list"}"
  done
}

case $action in
  start)
    ask=(kubectl get jobset "$name" --namespace="$namespace" --ignore-not-found)
    ask+=(--output="jsonpath={.metadata.name} {.metadata.labels.created-by}")
    if [[ -n $DRY_RUN ]]; then
      quoted "${ask[@]}"
      echo "kubectl apply -f - <<'END'"
      manifest
      echo "END"
    else
      owner=$("${ask[@]}")
      [[ -z $owner || $owner == "$name $OWNER_LABEL" ]] ||
        die "a JobSet $name is there that these scripts did not create: it is not touched; choose another --name"
      manifest | kubectl apply -f -
    fi
    ;;
  logs) run kubectl logs --namespace="$namespace" --follow --tail=100 \
    --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" ;;
  status) run kubectl get jobset,pods --namespace="$namespace" --selector="created-by=$OWNER_LABEL,run=$name" ;;
  delete) run kubectl delete jobset --namespace="$namespace" --selector="created-by=$OWNER_LABEL,run=$name" ;;
esac
