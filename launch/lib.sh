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

# start_again CODE: whether a run that ended so should be started again: it was preempted, hung or lost another process
# (75), or one of its processes was killed.
start_again() {
  (($1 == 75 || $1 >= 128))
}

# need NAME VALUE FLAG: refuses to go on without a value.
need() {
  [[ -n $2 ]] || die "$1 is missing: give $3"
}

main_arguments=()

# read_options NAMES SWITCHES ARGUMENT...: sets the variable of each --NAME=VALUE, 1 for each --SWITCH, DRY_RUN for
# --dry_run, and main_arguments to what follows --; anything else ends the script.
read_options() {
  local names=" $1 " switches=" $2 " option
  shift 2
  while (($#)); do
    option=${1#--}
    case $1 in
      --)
        shift
        # shellcheck disable=SC2034
        main_arguments=("$@")
        return
        ;;
      --dry_run) DRY_RUN=1 ;;
      --*=*)
        [[ $names == *" ${option%%=*} "* ]] || die "unknown option $1; see the head of launch/${0##*/}"
        printf -v "${option%%=*}" %s "${option#*=}"
        ;;
      *)
        [[ $1 == --* && $switches == *" $option "* ]] || die "unknown option $1; see the head of launch/${0##*/}"
        printf -v "$option" 1
        ;;
    esac
    shift
  done
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
