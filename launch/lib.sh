# Shared by the launch scripts; source it, do not run it.
# shellcheck shell=bash

DRY_RUN=""
# On everything these scripts create; they delete nothing without it.
# shellcheck disable=SC2034
OWNER_LABEL=m3ae-jax-launch

# die MESSAGE: one line to standard error, exit code 2.
die() {
  echo "error: $*" >&2
  exit 2
}

# say MESSAGE: one line of progress.
say() {
  echo "launch: $*" >&2
}

# need NAME VALUE FLAG: refuses to go on without a value.
need() {
  [[ -n $2 ]] || die "$1 is missing: give $3"
}

# quoted WORD...: the words as a shell would read them, on one line.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}

# run COMMAND...: runs it, or prints it in a dry run.
run() {
  if [[ -n $DRY_RUN ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# need_program NAME: refuses to go on without it (a dry run needs none).
need_program() {
  [[ -n $DRY_RUN ]] || command -v "$1" >/dev/null || die "$1 is not installed or not on the PATH"
}
