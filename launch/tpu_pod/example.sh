# ---- tpu_pod.sh
#!/usr/bin/env bash
# decoder-llama-7b: decoder:llama_7b on v5e:16x16, as a queued resource. Runs on your machine: asks for the TPU,
# asks again when it was preempted, and ends when the run has written its report.
set -euo pipefail

startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat >"$startup" <<'WORKER'
#!/usr/bin/env bash
# On every worker at every boot. systemd starts the run again unless it is done (0) or was given
# wrong input (2); on preemption it sends SIGTERM, upon which the run saves and leaves (75).
set -euo pipefail
python3 -m venv /opt/jaxformer
/opt/jaxformer/bin/pip install --quiet 'jaxformer[tpu,gcs]'
systemd-run --unit=jaxformer --property=Restart=on-failure --property=RestartPreventExitStatus=2 \
  --property=RestartSec=10 --property=TimeoutStopSec=120 --setenv=HOME=/root \
  /opt/jaxformer/bin/jaxformer train --config=decoder:llama_7b --mesh=v5e_256 --workdir=gs://BUCKET/RUN
WORKER

create() {
  gcloud compute tpus queued-resources create decoder-llama-7b --project=P --zone=us-west4-a \
    --node-id=decoder-llama-7b --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite \
    --spot --metadata-from-file=startup-script="$startup"
}

state() {
  gcloud compute tpus queued-resources describe decoder-llama-7b --project=P --zone=us-west4-a \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

delete() {
  gcloud compute tpus queued-resources delete decoder-llama-7b --project=P --zone=us-west4-a \
    --force --quiet
}

until gcloud storage ls gs://BUCKET/RUN/report.md >/dev/null 2>&1; do
  case $(state) in
    NONE) create ;;
    SUSPENDED | FAILED) delete ;;  # preempted, or not to be had: ask again
  esac
  sleep 60
done
delete
echo "decoder-llama-7b: done; see gs://BUCKET/RUN/report.md"
# would run: bash tpu_pod.sh
# logs: gcloud compute tpus tpu-vm ssh decoder-llama-7b --project=P --zone=us-west4-a --worker=0 --command='journalctl -fu jaxformer'
# metrics, checkpoints, report and traces: gs://BUCKET/RUN
# to stop and continue: delete the job, launch the same again

