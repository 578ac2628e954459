#!/usr/bin/env bash
# Runs one configuration on a Cloud TPU VM or slice; docs/running_on_cloud_tpu.md explains it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/launch_tpu.sh STEP --name=NAME --zone=ZONE [OPTION...] [-- --config.FIELD=VALUE...]

steps
  create    make the TPU VM                           needs --type
  install   copy the last commit, install it          on every worker
  run       train, or resume after an interruption    needs --config, --workdir
  logs      follow the log of a detached run
  stop      have the run save a checkpoint and end
  collect   copy the results here                     needs --workdir
  delete    delete the TPU VM
  all       create, install, run, collect, delete

options
  --name=NAME           of the TPU VM
  --zone=ZONE           such as us-west4-a
  --project=PROJECT     default: that of gcloud
  --type=TYPE           accelerator type, such as v5litepod-8
  --version=VERSION     TPU software; default: by type
  --spot                cheaper, may be taken away at any time
  --repo=URL            clone this instead of copying the last commit; --ref=REF for a branch or tag
  --config=FILE[:ARM]   configs/X.py or configs/X.py:arm
  --workdir=DIR         gs://BUCKET/PATH, or a folder that all workers share
  --data-dir=DIR        TFDS's prepared data, gs://BUCKET/PATH or a folder
  --detach              let the run go on after this command ends
  --out=DIR             where collect copies to; default: runs/NAME
  --dry-run             print every command, run none
TEXT
}

die() {
  printf 'launch_tpu.sh: %s\n' "$1" >&2
  exit 2
}

# Prints a word as a shell reads it: here for --dry-run, and on the VM.
quote() {
  local escaped="'\\''"
  case $1 in
    "" | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "${1//\'/$escaped}" ;;
    *) printf '%s' "$1" ;;
  esac
}

# Runs a command, or prints it under --dry-run.
do_it() {
  local word line=""
  if [ -z "$dry_run" ]; then
    "$@"
    return
  fi
  for word in "$@"; do line+="$(quote "$word") "; done
  printf '%s\n' "${line% }"
}

tpu() {
  local verb=$1
  shift
  do_it gcloud compute tpus tpu-vm "$verb" "$@" ${project:+"--project=$project"} "--zone=$zone"
}

on_workers() { tpu ssh "$name" "--worker=$1" "--command=$2"; }

software_version() {
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "no default software for --type=$1: name it with --version=VERSION" ;;
  esac
}

create() {
  tpu create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
}

install() {
  local source=asgd_jax.bundle environment branch=""
  if [ -n "$repo" ]; then
    source=$(quote "$repo")
    branch=${ref:+"--branch=$(quote "$ref") "}
  else
    if ! git -C "$root" diff --quiet HEAD; then
      echo "launch_tpu.sh: uncommitted changes are not copied" >&2
    fi
    # A bundle keeps the commit, which every summary.json names.
    do_it git -C "$root" bundle create --quiet "$bundle" HEAD
    tpu scp "$bundle" "$name:asgd_jax.bundle" --worker=all
  fi
  # The images' own Python is too old; uv brings one.
  environment='python3 -m pip install --user --quiet uv'
  environment+=' && ~/.local/bin/uv venv --quiet --allow-existing --python=3.11 asgd_env'
  environment+=' && ~/.local/bin/uv pip install --quiet --python=asgd_env'
  environment+=' --requirement asgd_jax/requirements.txt --editable "asgd_jax[train,tpu]"'
  on_workers all "rm -rf asgd_jax && git clone --quiet $branch$source asgd_jax && $environment"
  case $workdir in
    "" | gs://*) on_workers all "$(install_gcsfuse)" ;;
  esac
  # All workers at once: the chips of a slice answer only when every host asks.
  on_workers all 'asgd_env/bin/python -c "import jax; print(jax.device_count(), jax.devices()[0])"'
}

install_gcsfuse() {
  local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  printf '%s' "command -v gcsfuse >/dev/null || { curl -fsSL $packages/doc/apt-key.gpg" \
    " | sudo tee $key >/dev/null && echo \"deb [signed-by=$key] $packages" \
    " gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list" \
    " >/dev/null && sudo apt-get update -qq && sudo apt-get install -qq -y fuse gcsfuse; }"
}

run() {
  local folder mount="" train option path bucket
  case $workdir in
    gs://*)
      # A run writes through the file system, so the bucket becomes a folder on every worker.
      path=${workdir#gs://}
      bucket=$(quote "${path%%/*}")
      mount="mkdir -p ~/gcs/$bucket && { mountpoint -q ~/gcs/$bucket"
      # No metadata cache: what one worker writes, the others must see at once. Orbax renames folders.
      mount+=" || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000"
      mount+=" $bucket ~/gcs/$bucket; } && "
      folder="\"\$HOME\"/gcs/$(quote "$path")"
      ;;
    *) folder=$(quote "$workdir") ;;
  esac
  train="../asgd_env/bin/python scripts/train.py --config=$(quote "$config") --workdir=$folder"
  train+=" --config.multihost=true"
  if [ -n "$data_dir" ]; then train+=" $(quote "--config.data_dir=$data_dir")"; fi
  for option in ${train_options[@]+"${train_options[@]}"}; do train+=" $(quote "$option")"; done
  train="${mount}cd asgd_jax && echo \$\$ >../train.pid && exec $train"
  if [ -n "$detach" ]; then
    train="nohup setsid bash -c $(quote "$train") >train.log 2>&1 </dev/null &"
  fi
  on_workers all "$train"
}

logs() { on_workers 0 'tail -n 100 -F train.log'; }

# shellcheck disable=SC2016  # the shell of the worker expands it
stop() { on_workers all 'kill -TERM "$(cat train.pid)"'; }

collect() {
  case $workdir in
    gs://*)
      do_it mkdir -p "$out"
      do_it gcloud storage rsync --recursive '--exclude=(^|.*/)checkpoints/.*' "$workdir" "$out"
      ;;
    *)
      do_it mkdir -p "$(dirname "$out")"
      case $workdir in
        /*) tpu scp "$name:$workdir" "$out" --recurse --worker=0 ;;
        *) tpu scp "$name:asgd_jax/$workdir" "$out" --recurse --worker=0 ;;
      esac
      ;;
  esac
}

delete() { tpu delete "$name" --quiet; }

all() {
  started=1
  create
  install
  run
  collect
  delete
}

# need "$value" --option: refuses a step without one of its options.
need() {
  if [ -z "$1" ]; then die "$step needs $2"; fi
}

check_tpu() {
  need "$name" --name=NAME
  need "$zone" --zone=ZONE
  # Neither may look like an option to gcloud.
  case $name in [!a-z]* | *[!a-z0-9-]*) die "--name=$name: use lower-case letters, digits and -" ;; esac
  case $zone in [!a-z]* | *[!a-z0-9-]*) die "--zone=$zone is no zone, such as us-west4-a" ;; esac
}

check_run() {
  need "$config" --config=configs/X.py
  case $config in
    configs/*) ;;
    *) die "--config=$config: name a file of the repository, configs/X.py or configs/X.py:arm" ;;
  esac
  if [ -z "$repo" ] && ! git -C "$root" cat-file -e "HEAD:${config%%:*}" 2>/dev/null; then
    die "${config%%:*} is not in the last commit, which is what runs: commit it, or use --repo=URL"
  fi
}

check_workdir() {
  need "$workdir" --workdir=gs://BUCKET/PATH
  case $workdir in
    gs://?*/?*) ;;
    gs:*) die "--workdir=$workdir is no folder of a bucket: use gs://BUCKET/PATH" ;;
    -*) die "--workdir=$workdir: a folder cannot begin with -" ;;
  esac
}

parse() {
  local argument
  while [ $# -gt 0 ]; do
    argument=$1
    shift
    case $argument in
      --) break ;;
      --name=*) name=${argument#*=} ;;
      --zone=*) zone=${argument#*=} ;;
      --project=*) project=${argument#*=} ;;
      --type=*) type=${argument#*=} ;;
      --version=*) version=${argument#*=} ;;
      --repo=*) repo=${argument#*=} ;;
      --ref=*) ref=${argument#*=} ;;
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
      --data-dir=*) data_dir=${argument#*=} ;;
      --out=*) out=${argument#*=} ;;
      --spot) spot=1 ;;
      --detach) detach=1 ;;
      --dry-run) dry_run=1 ;;
      --config.*) die "$argument belongs behind --" ;;
      --name | --zone | --project | --type | --version | --repo | --ref | --config | --workdir | \
        --data-dir | --out) die "$argument needs a value: $argument=VALUE" ;;
      *) die "unknown option $argument: see --help" ;;
    esac
  done
  for argument in "$@"; do
    case $argument in
      --config.?*=*) train_options+=("$argument") ;;
      *) die "$argument: behind -- only --config.FIELD=VALUE is passed on" ;;
    esac
  done
}

check() {
  check_tpu
  case $step in
    create | all)
      need "$type" --type=TYPE
      if [ -z "$version" ]; then version=$(software_version "$type"); fi
      ;;
  esac
  case $step in run | all) check_run ;; esac
  case $step in run | collect | all) check_workdir ;; esac
  if [ "$step" = all ] && [ -n "$detach" ]; then
    die "all cannot --detach: it would collect and delete at once"
  fi
  if [ -n "$ref" ] && [ -z "$repo" ]; then die "--ref=$ref needs --repo=URL"; fi
  if [ -z "$out" ]; then out=runs/$name; fi
  if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
    die "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
  fi
}

clean_up() {
  local status=$?
  if [ -n "$scratch" ]; then rm -rf "$scratch"; fi
  if [ "$status" -ne 0 ] && [ -n "$started" ]; then
    echo "launch_tpu.sh: stopped; $name may exist and cost money: resume with the run step," \
      "or delete it" >&2
  fi
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name="" zone="" project="" type="" version="" repo="" ref="" config="" workdir="" data_dir="" out=""
spot="" detach="" dry_run="" started="" scratch=""
train_options=()
bundle=/tmp/asgd_jax.bundle
step=${1:-}
case $step in
  create | install | run | logs | stop | collect | delete | all) shift ;;
  -h | --help)
    usage
    exit
    ;;
  "") die "needs a step: create, install, run, logs, stop, collect, delete or all; see --help" ;;
  *) die "unknown step $step: use create, install, run, logs, stop, collect, delete or all" ;;
esac
parse "$@"
check
if [ -z "$dry_run" ]; then
  trap clean_up EXIT
  scratch=$(mktemp -d)
  bundle=$scratch/asgd_jax.bundle
fi
"$step"
