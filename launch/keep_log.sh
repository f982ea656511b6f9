#!/usr/bin/env bash
# Runs a command and keeps what it prints in a folder too, a file for each attempt: FOLDER/HOST-TIME.log. gke.sh and
# tpu_vm.sh use it: a pod's log is gone once it has started again, a machine's once it was taken away. A mounted bucket
# takes whole files: the log is copied each minute (KEEP_SECONDS) and at the end. SIGTERM is handed on to the command, whose
# exit code is this script's.
#
#   bash launch/keep_log.sh FOLDER COMMAND ...
set -uo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
folder="$1"
shift
log="$(mktemp)" kept="$folder/$HOSTNAME-$(date -u +%Y%m%dT%H%M%SZ).log" stopped=""

keep() { mkdir -p "$folder" && cp "$log" "$kept"; }

exec 3> >(trap '' TERM INT && exec tee "$log") # a signal to all must not end it before the command
tee=$!
echo "attempt on $HOSTNAME began $(date -u +%FT%TZ)" >&3
"$@" >&3 2>&1 3>&- &
command=$!
trap 'stopped=1; kill -TERM "$command"' TERM
exec 3>&-
(trap exit TERM; while sleep "${KEEP_SECONDS:-60}" & wait $!; do keep; done) >/dev/null 2>&1 &
copies=$!
wait "$command"
code=$?
while [ -n "$stopped" ]; do # a signal ended the wait, not the command
  wait "$command"
  code=$?
  kill -0 "$command" 2>/dev/null || break
done
for _ in $(seq 50); do # what the command has left running may hold the log open
  kill -0 "$tee" 2>/dev/null || break
  sleep 0.1
done
kill "$copies" 2>/dev/null && wait "$copies" # a copy that is under way ends first, so that the last is the whole log
if keep; then rm -f "$log"; else echo "the log could not be kept in $folder; it is in $log" >&2; fi
exit "$code"
