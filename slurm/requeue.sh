# The end of a job script, after srun: source this file with the job's home, e.g. `source slurm/requeue.sh runs/NAME`.
# `pomscale launch` puts its text behind the srun line of the scripts that submitit writes.
#
# The supervisor of the job (launch/supervisor.py) has decided by now whether the job starts again and which nodes it
# should avoid; that is done here, outside of srun and of any container. SLURM ends this script as soon as the job is
# requeued, but gives it KillWait seconds: enough to name the nodes.
pomscale_end() {
  local code=$1 home=$2 job=$SLURM_JOB_ID wanted state="" restarts="" requeued="" suspects already without left
  # The number of the last task of an array is that of the array: only this names the task alone.
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
  wanted=$home/attempts/$job-${SLURM_RESTART_COUNT:-0}/requeue
  if [ ! -f "$wanted" ]; then exit "$code"; fi
  # It may say nothing while a node goes down, or while its controller is restarted; and a controller that was killed
  # before it wrote down that this start runs takes it for pending, until the node has told.
  for _ in {1..36}; do
    read -r state restarts < <(squeue --noheader --jobs "$job" --Format State:24,RestartCnt:12)
    if [ -n "$state" ] && [ "$state $restarts" != "PENDING ${SLURM_RESTART_COUNT:-0}" ]; then break; fi
    sleep 5
  done
  if [ "$state" != RUNNING ]; then # cancelled, preempted or out of time: SLURM is ending the job, its word counts
    echo "not requeued: SLURM ends this job itself (${state:-gone})"
    exit "$code"
  fi
  if [ "$restarts" != "${SLURM_RESTART_COUNT:-0}" ]; then # this node was taken for dead: the job runs elsewhere by now
    echo "not requeued: SLURM has started this job again already"
    exit "$code"
  fi
  trap '' TERM
  for _ in {1..6}; do
    if scontrol requeue "$job"; then requeued=yes; break; fi
    sleep 10
  done
  suspects=$(cat "$wanted")
  if [ -n "$requeued" ] && [ -n "$suspects" ]; then
    already=$(squeue --noheader --jobs "$job" --format %x) # what the job was submitted without stays out
    without=${already:+$already,}$suspects
    left=$(sinfo --noheader --Node --partition "$SLURM_JOB_PARTITION" --format %N | sort -u |
      grep --count --invert-match --line-regexp --fixed-strings --file <(scontrol show hostnames "$without"))
    if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then # it would wait for good
      echo "requeued; without $suspects its partition has too few nodes, so nothing is excluded"
    else
      echo "requeued, without $suspects"
      scontrol update "JobId=$job" "ExcNodeList=$without" || echo "warning: $suspects could not be excluded"
    fi
  fi
  if [ -n "$requeued" ]; then sleep 60; fi
  exit "$code"
}
