#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has JobSet (one made with xpk does): image, run, list, logs, delete.
# NOT RUN YET on a cluster; --dry-run has been, it prints the commands and needs neither docker nor kubectl.
#
#   bash launch/gke.sh [--dry-run] image                   builds launch/Dockerfile as IMAGE and pushes it
#   bash launch/gke.sh [--dry-run] run NAME ARGUMENTS      python -m deepasmr_jax.train ARGUMENTS on every host
#   bash launch/gke.sh [--dry-run] list
#   bash launch/gke.sh [--dry-run] logs NAME               follows the first host, which alone prints steps
#   bash launch/gke.sh [--dry-run] collect NAME FOLDER     logs as files: of the pods there are, and of every attempt of every
#                                                          host, which the bucket keeps in logs/NAME
#   bash launch/gke.sh [--dry-run] delete NAME
#
# IMAGE (such as europe-docker.pkg.dev/PROJECT/REPOSITORY/deepasmr:1) has to be set; for `run` and `collect` BUCKET (mounted at
# /bucket; give --workdir and data.data_dirs there), ACCELERATOR (such as tpu-v5-lite-podslice) and TOPOLOGY (such as
# 4x4). CHIPS (of a host, default 4), SLICES (default 1), ACCOUNT (default "default") and RESTARTS (default 100) may be.
# All recipes of full size take what chips there are; vocoder.py keeps at most 16 busy. A cluster, for example:
#   xpk cluster create --cluster NAME --tpu-type=v5litepod-16 --num-slices=1 --spot --enable-gcsfuse-csi-driver
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

usage() {
  sed -n '2,17p' "$0" >&2
  exit 2
}

dry=""
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
what="${1:-}" name="${2:-}"
case "$what" in
  image | list) ;;
  run | logs | delete | collect) [ -n "$name" ] || usage ;;
  *) usage ;;
esac

# Prints launch/gke.yaml filled in; the arguments of the training as a list of JSON strings.
manifest() {
  local chips="${CHIPS:-4}" count=1 part text arguments="" argument
  for part in ${TOPOLOGY//x/ }; do count=$((count * part)); done
  if [ $((count % chips)) != 0 ]; then
    echo "TOPOLOGY $TOPOLOGY has $count chips, no multiple of CHIPS=$chips" >&2
    return 2
  fi
  for argument in "$@"; do
    argument="${argument//\\/\\\\}"
    arguments+="${arguments:+, }\"${argument//\"/\\\"}\""
  done
  text="$(cat launch/gke.yaml)"
  fill() { text="${text//"{{$1}}"/"$2"}"; }
  fill NAME "$name" && fill IMAGE "$IMAGE" && fill BUCKET "$BUCKET" && fill ACCELERATOR "$ACCELERATOR"
  fill TOPOLOGY "$TOPOLOGY" && fill CHIPS "$chips" && fill HOSTS "$((count / chips))" && fill SLICES "${SLICES:-1}"
  fill ACCOUNT "${ACCOUNT:-default}" && fill RESTARTS "${RESTARTS:-100}" && fill ARGUMENTS "[$arguments]"
  printf '%s\n' "$text"
}

case "$what" in
  image)
    : "${IMAGE:?set IMAGE, such as europe-docker.pkg.dev/PROJECT/REPOSITORY/deepasmr:1}"
    do_it docker build -f launch/Dockerfile --build-arg EXTRAS=tpu,zh,tensorboard -t "$IMAGE" .
    do_it docker push "$IMAGE"
    ;;
  run)
    : "${IMAGE:?set IMAGE, see launch/gke.sh image}" "${BUCKET:?set BUCKET, the name without gs://}"
    : "${ACCELERATOR:?set ACCELERATOR, such as tpu-v5-lite-podslice}" "${TOPOLOGY:?set TOPOLOGY, such as 4x4}"
    shift 2
    filled="$(manifest "$@")"
    if [ -n "$dry" ]; then
      printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$filled"
    else
      kubectl apply -f - <<<"$filled"
    fi
    ;;
  list) do_it kubectl get jobsets ;;
  logs)
    do_it kubectl logs --follow --container=train \
      --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  collect)
    folder="${3:?name a folder for the logs}"
    : "${BUCKET:?set BUCKET, which keeps the logs of earlier attempts}"
    do_it mkdir -p "$folder/attempts"
    do_it gcloud storage rsync --recursive "gs://$BUCKET/logs/$name" "$folder/attempts" ||
      echo "no logs of attempts were found in gs://$BUCKET/logs/$name" >&2
    if [ -n "$dry" ]; then
      pods="POD_OF_EVERY_HOST"
    else
      pods="$(kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=name)"
    fi
    for pod in $pods; do
      do_it sh -c "kubectl logs --container=train $pod >$(printf '%q' "$folder")/${pod##*/}.log"
    done
    ;;
  delete) do_it kubectl delete jobset "$name" ;;
esac
