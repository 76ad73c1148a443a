# The end of a job script, after srun: source this file with the job's home, e.g. `source slurm/requeue.sh runs/NAME`.
# `pomscale launch` puts its text behind the srun line of the scripts that submitit writes.
#
# The supervisor of the job (launch/supervisor.py) has decided by now whether the job starts again and which nodes it
# should avoid; that is done here, outside of srun and of any container. SLURM ends this script as soon as the job is
# requeued, but gives it KillWait seconds: enough to name the nodes.
pomscale_end() {
  local code=$1 home=$2 job=$SLURM_JOB_ID state wanted
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
  wanted=$home/attempts/$job-${SLURM_RESTART_COUNT:-0}/requeue
  if [ ! -f "$wanted" ]; then exit "$code"; fi
  for _ in 1 2 3; do # it may say nothing while a node goes down
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
    if [ -n "$state" ]; then break; fi
    sleep 1
  done
  if [ "$state" != RUNNING ]; then # cancelled, preempted or out of time: SLURM is ending the job, its word counts
    echo "not requeued: SLURM ends this job itself (${state:-gone})"
    exit "$code"
  fi
  trap '' TERM
  scontrol requeue "$SLURM_JOB_ID" || exit "$code"
  local suspects
  suspects=$(cat "$wanted")
  if [ -n "$suspects" ]; then
    echo "requeued, without $suspects"
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$suspects" || echo "warning: $suspects could not be excluded"
  fi
  sleep 60
  exit "$code"
}
