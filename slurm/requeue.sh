# End of a job script, after srun. Source this file, then call: pomscale_end EXIT_CODE JOB_FOLDER (see train.sbatch).
# `pomscale launch` puts its text after the srun line of the scripts that submitit writes.
#
# The supervisor of the job (launch/node/supervisor.py) has decided by now whether the job starts again, and which nodes
# it should avoid. This function carries that out, outside of srun and of any container. SLURM ends this script as soon
# as the job is requeued, but waits KillWait seconds, which is enough to exclude the nodes.
pomscale_end() {
  local code=$1 job_folder=$2 job=$SLURM_JOB_ID wanted state="" restarts="" requeued="" refusal="" suspects
  local already without left
  # A user's own options for these commands, like SQUEUE_STATES, would hide this job (launch/scheduler/environment.py).
  unset ${!SALLOC_@} ${!SBATCH_@} ${!SRUN_@} ${!SQUEUE_@} ${!SACCT_@} ${!SINFO_@} ${!SCANCEL_@} ${!SCONTROL_@}
  # The job number of the last task of an array is that of the array, so tasks are named by array and index.
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
  wanted=$job_folder/attempts/$job-${SLURM_RESTART_COUNT:-0}/requeue
  if [ ! -f "$wanted" ]; then exit "$code"; fi
  # squeue may print nothing while a node goes down, or while the controller is restarted. A controller that was killed
  # before it recorded that this start runs takes the job for pending, until the node has reported.
  for _ in {1..36}; do
    read -r state restarts < <(squeue --noheader --jobs "$job" --Format State:24,RestartCnt:12)
    if [ -n "$state" ] && [ "$state $restarts" != "PENDING ${SLURM_RESTART_COUNT:-0}" ]; then break; fi
    sleep 5
  done
  if [ "$state" != RUNNING ]; then # cancelled, preempted or out of time: SLURM is ending the job itself
    echo "not requeued: SLURM ends this job itself (${state:-gone})"
    exit "$code"
  fi
  if [ "$restarts" != "${SLURM_RESTART_COUNT:-0}" ]; then # SLURM took this node for dead: the job runs elsewhere by now
    echo "not requeued: SLURM has started this job again already"
    exit "$code"
  fi
  trap '' TERM
  for _ in {1..6}; do
    if refusal=$(scontrol requeue "$job" 2>&1); then requeued=yes; break; fi
    sleep 10
  done
  if [ -z "$requeued" ]; then
    echo "not requeued, SLURM refuses: $refusal"
    echo "$refusal" > "${wanted%/*}/refused" # `pomscale runs` shows it
  fi
  suspects=$(cat "$wanted")
  if [ -n "$requeued" ] && [ -n "$suspects" ]; then
    already=$(squeue --noheader --jobs "$job" --format %x) # nodes that are excluded already stay excluded
    without=${already:+$already,}$suspects
    left=$(sinfo --noheader --Node --partition "$SLURM_JOB_PARTITION" --format %N | sort -u |
      grep --count --invert-match --line-regexp --fixed-strings --file <(scontrol show hostnames "$without"))
    if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then # the job would wait forever
      echo "requeued; without $suspects its partition has too few nodes, so nothing is excluded"
    else
      echo "requeued, without $suspects"
      scontrol update "JobId=$job" "ExcNodeList=$without" || echo "warning: $suspects could not be excluded"
    fi
  fi
  if [ -n "$requeued" ]; then sleep 60; fi
  exit "$code"
}
