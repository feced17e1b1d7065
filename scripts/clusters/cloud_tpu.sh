#!/usr/bin/env bash
# Train on a Cloud TPU slice: asks for it, starts train.py on all of its hosts, and does so again when it was preempted.
#
#   export TPU=ring-attention ZONE=us-west4-a ACCELERATOR=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
#   export IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/ring-attention-tpu:latest SHARE=10.0.0.2:/share
#   scripts/clusters/cloud_tpu.sh --config=configs/tpu_v5e_256_7b.py --config.run_dir=/shared/runs/7b
#
# TPU           name of the queued resource and of its slice
# IMAGE         that every host runs; docs/pods.md shows how to build it
# SHARE         an NFS export (Filestore), mounted at /shared on every host: the folder of the run must lie in it
# CREATE_FLAGS  for `gcloud compute tpus queued-resources create`, by default --spot; "" for slices that stay
#
# Everything after the script's name goes to train.py. The script stays, looks every POLL seconds (60), and can be
# stopped and started again at any time: what runs on the hosts does not depend on it. There train.py is a service of
# systemd's. So SIGTERM reaches it when a host shuts down, and the host starts it again when it ends, at most 10 times
# an hour, unless it has finished (0) or was told something wrong (2). docs/pods.md explains the rest.
set -euo pipefail
: "${TPU:?}" "${ZONE:?}" "${ACCELERATOR:?}" "${RUNTIME:?}" "${IMAGE:?}" "${SHARE:?}"
poll=${POLL:-60}
read -ra create_flags <<<"${CREATE_FLAGS---spot}"

say() { echo "cloud_tpu.sh: $*" >&2; }
queued() { gcloud compute tpus queued-resources "$@" --zone="$ZONE" --quiet; }
on_hosts() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --quiet --worker="$1" --command="$2"; }

# Quoted words for a shell on a host.
train=$(printf '%q ' docker run --rm --name=train --privileged --net=host --volume=/shared:/shared \
  --env=PYTHONUNBUFFERED=1 "$IMAGE" python train.py "$@")
mount="mountpoint -q /shared || { sudo apt-get install -qy nfs-common && sudo mkdir -p /shared \
  && sudo mount -t nfs $(printf %q "$SHARE") /shared; }"
service="sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet \
  && sudo systemd-run --unit=train --remain-after-exit --setenv=HOME=/root --property=After=docker.service \
  --property=Restart=on-failure --property=RestartPreventExitStatus=2 --property=RestartSec=60 \
  --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=10 --property=TimeoutStopSec=90 \
  --property=KillMode=mixed --property='ExecStartPre=-/usr/bin/docker rm --force train' $train"
# What systemd calls it: running, auto-restart, exited (finished) or failed; dead where it was never started.
look="systemctl show train --property=SubState --value"

start() { # on the hosts where it does not run
  on_hosts all "if [ \"\$($look)\" = dead ]; then $mount && $service; fi"
}

follow() { # until the run ends, or something has happened to a host
  local state
  while sleep "$poll"; do
    state=$(on_hosts 0 "$look" | tail -n 1) || return 0 # no answer: the queued resource will tell why
    case $state in
      running) ;;
      exited)
        say "finished; the slice is given back"
        queued delete "$TPU" --force
        exit 0
        ;;
      failed)
        say "train.py has failed for good; its last words on host 0:"
        on_hosts 0 "sudo journalctl --unit=train --lines=40 --no-pager" || true
        say "the slice is left as it is: gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force"
        exit 1
        ;;
      *) return 0 ;; # it waits to be restarted, or the host was: see to all of them
    esac
  done
}

while true; do
  state=$(queued describe "$TPU" --format='value(state.state)' 2>/dev/null || echo ABSENT)
  case $state in
    ABSENT)
      say "asking for $ACCELERATOR"
      queued create "$TPU" --node-id="$TPU" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
        ${create_flags[@]+"${create_flags[@]}"}
      ;;
    ACTIVE)
      say "starting train.py where it does not run"
      if start; then follow; fi
      ;;
    FAILED | SUSPENDED)
      say "the slice is gone ($state); the run goes on from its newest checkpoint on another"
      queued delete "$TPU" --force
      ;;
    *) say "waiting: $state" ;;
  esac
  sleep "$poll"
done
