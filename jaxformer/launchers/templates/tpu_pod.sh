#!/usr/bin/env bash
# <<name>>: <<config>> on <<topology>>, as a queued resource. Runs on your machine: asks for the TPU,
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
/opt/jaxformer/bin/pip install --quiet '<<package>>'
systemd-run --unit=jaxformer --property=Restart=on-failure --property=RestartPreventExitStatus=2 \
  --property=RestartSec=10 --property=TimeoutStopSec=<<grace>> --setenv=HOME=/root \
  /opt/jaxformer/bin/<<command>>
WORKER

create() {
  gcloud compute tpus queued-resources create <<name>> --project=<<project>> --zone=<<zone>> \
    <<nodes>> --accelerator-type=<<accelerator>> --runtime-version=<<runtime>> \
    <<spot>>--metadata-from-file=startup-script="$startup"
}

state() {
  gcloud compute tpus queued-resources describe <<name>> --project=<<project>> --zone=<<zone>> \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

delete() {
  gcloud compute tpus queued-resources delete <<name>> --project=<<project>> --zone=<<zone>> \
    --force --quiet
}

until gcloud storage ls <<workdir>>/report.md >/dev/null 2>&1; do
  case $(state) in
    NONE) create ;;
    SUSPENDED | FAILED) delete ;;  # preempted, or not to be had: ask again
  esac
  sleep 60
done
delete
echo "<<name>>: done; see <<workdir>>/report.md"
