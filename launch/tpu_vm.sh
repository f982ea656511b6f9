#!/usr/bin/env bash
# Trains on a Cloud TPU VM: create, install on all workers, mount a bucket, run, logs, stop, delete.
# NOT RUN YET on a TPU VM; run and stop have been with stand-ins. --dry-run prints the commands, without gcloud or account.
#
#   bash launch/tpu_vm.sh [--dry-run] create NAME
#   bash launch/tpu_vm.sh [--dry-run] install NAME          copies this checkout's HEAD and installs it on every worker
#   bash launch/tpu_vm.sh [--dry-run] mount NAME            mounts the bucket BUCKET at /mnt/bucket on every worker
#   bash launch/tpu_vm.sh [--dry-run] run NAME ARGUMENTS    python -m deepasmr_jax.train ARGUMENTS on every worker; again
#                                                           after a failure, unless it would come again (exit code 2).
#                                                           With BUCKET (mounted) each attempt's log is kept in its logs/NAME
#   bash launch/tpu_vm.sh [--dry-run] logs NAME             follows the first worker, which alone prints steps
#   bash launch/tpu_vm.sh [--dry-run] collect NAME FOLDER   every worker's log, of all runs on this machine, as files; before
#                                                           it is deleted. With BUCKET also what the bucket kept,
#                                                           of machines that are gone too
#   bash launch/tpu_vm.sh [--dry-run] stop NAME             SIGTERM, and waits: all workers save and end (what hangs: ssh, pkill -KILL)
#   bash launch/tpu_vm.sh [--dry-run] delete NAME
#
# ZONE, TYPE (such as v5litepod-16) and VERSION (the image, such as v2-alpha-tpuv5-lite) have to be set; PROJECT, BUCKET
# and SPOT=1 (a cheaper machine that may be taken away, with SIGTERM, at which training saves; untested there) may be. On
# several workers --workdir and data.data_dirs must be one shared place with the same path on all of them: a folder of the
# mounted bucket, or NFS. All recipes of full size take what chips there are; vocoder.py keeps at most 16 busy.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

dry=""
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
if [ $# -lt 2 ]; then
  sed -n '2,21p' "$0" >&2
  exit 2
fi
what="$1" name="$2"
shift 2
if [ -z "${ZONE:-}" ]; then
  echo "set ZONE, such as us-central2-b" >&2
  exit 2
fi
place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

tpu() { do_it gcloud compute tpus tpu-vm "$@" "${place[@]}"; }

on_all() { tpu ssh "$name" --worker=all "--command=$1"; }

case "$what" in
  create)
    if [ -z "${TYPE:-}" ] || [ -z "${VERSION:-}" ]; then
      echo "set TYPE, such as v5litepod-16, and VERSION, such as v2-alpha-tpuv5-lite" >&2
      exit 2
    fi
    tpu create "$name" "--accelerator-type=$TYPE" "--version=$VERSION" ${SPOT:+--spot}
    ;;
  mount)
    if [ -z "${BUCKET:-}" ]; then
      echo "set BUCKET, the name without gs://" >&2
      exit 2
    fi
    keys=/usr/share/keyrings/cloud.google.asc source=https://packages.cloud.google.com/apt
    on_all "command -v gcsfuse >/dev/null || {
        curl -fsSL $source/doc/apt-key.gpg | sudo tee $keys >/dev/null &&
        echo deb [signed-by=$keys] $source gcsfuse-\$(lsb_release -cs) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list &&
        sudo apt-get -q update && sudo apt-get -qy install gcsfuse; } &&
      sudo install -d -o \$USER /mnt/bucket && { mountpoint -q /mnt/bucket || gcsfuse --implicit-dirs \
        --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $BUCKET /mnt/bucket; }" # all hosts see a file at once
    ;;
  install)
    archive="$(mktemp -d)/deepasmr.tar.gz"
    do_it git archive --format=tar.gz "--output=$archive" HEAD
    tpu scp "$archive" "$name:deepasmr.tar.gz" --worker=all
    # the images may have an older Python than 3.11; uv brings one
    on_all "mkdir -p deepasmr && tar -xzf deepasmr.tar.gz -C deepasmr && cd deepasmr && pip install --user uv &&
      ~/.local/bin/uv venv --python 3.12 .venv && ~/.local/bin/uv pip install --python .venv/bin/python -e '.[tpu,tensorboard]'"
    ;;
  run)
    if [ $# = 0 ]; then
      echo "give the arguments of the training: run $name --config=... --workdir=... --set=data.data_dirs=..." >&2
      exit 2
    fi
    if [ -n "$dry" ]; then
      first="ADDRESS_OF_WORKER_0"
    else
      first="$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(networkEndpoints[0].ipAddress)')"
    fi
    arguments="$(printf '%q ' "$@")"
    # where one worker fails the others end too, after JAX's heartbeat, and all join again. `stop` ends the loop
    loop='for try in $(seq 100); do echo "attempt $try of this run began $(date -u +%FT%TZ)"; "$@" && exit; [ $? = 2 ] && exit 2; sleep 30; done'
    # the address makes the program join the workers (sharding.start_hosts); JAX asks the VM for the rest
    kept="" mounted=""
    if [ -n "${BUCKET:-}" ]; then
      kept="bash launch/keep_log.sh /mnt/bucket/logs/$name"
      mounted="mountpoint -q /mnt/bucket || { echo 'first: tpu_vm.sh mount $name, as BUCKET is set' >&2; exit 2; }; "
    fi
    on_all "${mounted}cd deepasmr && JAX_COORDINATOR_ADDRESS=$first:8476 JAX_COMPILATION_CACHE_DIR=\$HOME/xla \
nohup bash -c '$loop' train $kept .venv/bin/python -m deepasmr_jax.train $arguments >>train.log 2>&1 </dev/null &"
    ;;
  logs) tpu ssh "$name" --worker=0 --command="tail -n 50 -f deepasmr/train.log" ;;
  collect)
    if [ -z "${1:-}" ]; then
      echo "name a folder for the logs: collect $name FOLDER" >&2
      exit 2
    fi
    folder="$1" missing=0
    do_it mkdir -p "$folder${BUCKET:+/attempts}"
    if [ -n "${BUCKET:-}" ]; then
      do_it gcloud storage rsync --recursive "gs://$BUCKET/logs/$name" "$folder/attempts" || {
        echo "nothing could be fetched from gs://$BUCKET/logs/$name" >&2
        missing=1
      }
    fi
    workers="N"
    if [ -z "$dry" ]; then
      count="$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(networkEndpoints.len())')" || count=0
      if [ "${count:-0}" = 0 ]; then
        echo "no worker of $name could be asked; what the bucket kept is in $folder/attempts where BUCKET is set" >&2
        exit 1
      fi
      workers="$(seq 0 $((count - 1)))"
    fi
    for worker in $workers; do
      tpu scp "$name:deepasmr/train.log" "$folder/worker-$worker.log" "--worker=$worker" || {
        echo "worker $worker gave no log" >&2
        missing=1
      }
    done
    exit "$missing"
    ;;
  stop) # loop and training, and waits until they and the last copy of the log are done
    ours='[.]venv/bin/python -m deepasmr_jax[.]train'
    on_all "pkill -TERM -f '^(bash -c for try.*|)$ours'; while pgrep -f '^(bash (-c for try|launch/keep_log).*|)$ours' >/dev/null; do sleep 1; done"
    ;;
  delete) tpu delete "$name" ;;
  *)
    echo "unknown command $what: create, install, mount, run, logs, collect, stop or delete" >&2
    exit 2
    ;;
esac
