"""Name of every file and folder of a run folder. This tree is the description; no other module spells a name.

A run folder is made by `pomscale train`, or by `pomscale launch`, which puts the job's own files beside the run's.
START is the number of a start of the run, RANK that of a process. "report" is `pomscale report`, "runs" are the verbs
`pomscale runs ...` and `pomscale watch`, "resume" is the next start of the run. Files on disk keep the names that they
were given when a start was called a generation or an incarnation.

    RUN/                                  written by                       read by
      recipe.yaml                         each start: its resolved recipe  resume, runs, report, wandb, evaluations
      code.json, code.diff                each start: commit, difference   runs diff, report, wandb
      incarnations.jsonl                  each start: one line             history, runs, report
      generations/000001                  each start: its claim            every start before it writes, runs
      metrics.jsonl                       training: one line per row       history, runs, report
      events.jsonl                        training: time spent, events     ledger, runs, report
      bad_samples.jsonl                   training: samples left out       resume
      evaluations.jsonl                   evaluation jobs, by hand         history, runs, report, wandb
      evaluations.delivered               wandb: bytes given to wandb      wandb
      outcome.json                        a start that ends                resume, runs, report
      outcomes/incarnation-START-rank-RANK.json
                                          ranks that end                   supervisor, runs
      stacks/incarnation-START-rank-RANK.txt
                                          the watchdog of a rank           people, supervisor
      checkpoints/judged.json             training: values of best_metric  retention
      checkpoints/samples-SAMPLES/        training                         resume, sample, evaluate, export
        checkpoint.json                   clock, recipe, data, versions    (see runs.checkpoint_folder)
        checksums.json, COMPLETE          the seal, written last           (see runs.integrity)
        .metadata, __*.distcp             torch.distributed.checkpoint     torch.distributed.checkpoint
      ema/samples-SAMPLES/                training: averages, for post hoc `pomscale ema`
      samples/samples-SAMPLES.png, .mp4   training: generated samples      report, wandb
      profile/rank-RANK-trace.json.gz     the profiler                     ui.perfetto.dev
      profile/rank-RANK-memory.pickle     the profiler, on CUDA            pytorch.org/memory_viz
      compile_cache.bin                   training: torch.compile's cache  resume
      .preflight-TOKEN                    preflight, removed at once       preflight
      wandb/                              wandb                            runs sync, `wandb sync`
        .room                             wandb sink, removed at once      wandb sink
        .pomscale-sync.lock               runs sync: a lock                runs sync
      wandb_id.txt                        wandb: id of the wandb run       wandb, runs sync
      wandb_ids.json                      wandb: ids of before, and why    wandb, runs sync
      wandb.lock                          wandb: a lock                    wandb, runs sync
      report.png, report.html             report                           people
      against.png                         report --against                 people
      evaluations/NAME/samples-SAMPLES/   a job folder, and in it
        checkpoint/                       supervisor: files of the checkpoint, linked
        failed.json                       supervisor: why it was given up  supervisor, report
        figures.json                      the evaluation's last command    `pomscale evaluate record`

    What a job adds (launch.record has the formats); the folder of an encode or of a pipeline's stage has these alone:
      job.json                            launch: what to run, and how     every start of the job
      launch.json                         launch: how it was asked for     runs resume
      launch.lock                         launch: a lock                   launch
      launch/recipe.yaml                  launch: the recipe to run        `pomscale train`, `pomscale data encode`
      jobs.jsonl                          launch: one line per submission  runs, supervisor
      code/                               launch: frozen copy of the code  every start of the job
        code.json, code.diff              launch: commit, difference       each start of the run
      attempts/JOB-RESTART/               one folder per start of the job
        start.json                        supervisor: where it runs        runs, supervisor
        rank-RANK.json                    guard: how the process ended     supervisor, runs
        verdict.json                      supervisor: what happens next    runs, the job's process
        end                               supervisor: all ranks shall end  guards
        requeue                           supervisor: hosts to avoid       slurm/requeue.sh, the job's process
        refused                           slurm/requeue.sh: SLURM's words  runs
      logs/rank-RANK.log                  guard: output of the rank        runs logs, people
      submitit/                           submitit, guards' own output     people
        controller.log                    the controller of a local job    people
"""

from __future__ import annotations

from pathlib import Path

# The run.
RECIPE_FILE = "recipe.yaml"
CODE_STATE_FILE, CODE_DIFF_FILE = "code.json", "code.diff"
STARTS_FILE = "incarnations.jsonl"
CLAIMS_FOLDER = "generations"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
DELIVERED_FILE = "evaluations.delivered"
OUTCOME_FILE = "outcome.json"
OUTCOMES_FOLDER, STACKS_FOLDER = "outcomes", "stacks"
CHECKPOINTS_FOLDER, EMA_FOLDER = "checkpoints", "ema"
SAMPLES_FOLDER = "samples"
PROFILE_FOLDER = "profile"
COMPILE_CACHE_FILE = "compile_cache.bin"
PREFLIGHT_PREFIX = ".preflight-"
WANDB_FOLDER = "wandb"
WANDB_ROOM_FILE, WANDB_SYNC_LOCK_FILE = "wandb/.room", "wandb/.pomscale-sync.lock"
WANDB_ID_FILE, WANDB_IDS_FILE, WANDB_LOCK_FILE = "wandb_id.txt", "wandb_ids.json", "wandb.lock"
REPORT_NAME = "report"  # and .png or .html
AGAINST_FILE = "against.png"

# A folder of checkpoints, and a checkpoint.
JUDGED_FILE = "judged.json"
CHECKPOINT_META = "checkpoint.json"
CHECKSUMS, MARKER = "checksums.json", "COMPLETE"

# Evaluations of checkpoints.
EVALUATIONS_FOLDER = "evaluations"
EVALUATED_FOLDER = "checkpoint"
FAILED_FILE = "failed.json"

# The job.
JOB_FILE, LAUNCH_FILE, JOBS_FILE, LAUNCH_LOCK_FILE = "job.json", "launch.json", "jobs.jsonl", "launch.lock"
LAUNCHED_RECIPE_FILE = "launch/recipe.yaml"
CODE_FOLDER = "code"
ATTEMPTS_FOLDER = "attempts"
START_FILE, VERDICT_FILE, END_FILE, REQUEUE_FILE = "start.json", "verdict.json", "end", "requeue"
REFUSED_FILE = "refused"
LOGS_FOLDER = "logs"
SUBMITIT_FOLDER = "submitit"
CONTROLLER_LOG_FILE = f"{SUBMITIT_FOLDER}/controller.log"


def claim_path(run_folder: Path, start: int) -> Path:
    """Claim of the start with this number."""
    return run_folder / CLAIMS_FOLDER / f"{start:06d}"


def outcome_path(run_folder: Path, start: int, rank: int) -> Path:
    """Outcome of one rank of a start."""
    return run_folder / OUTCOMES_FOLDER / f"{_start_and_rank(start, rank)}.json"


def outcome_paths(run_folder: Path) -> list[Path]:
    """Outcomes of all ranks of all starts that have left one; `start_and_rank_of` tells whose each is."""
    return list((run_folder / OUTCOMES_FOLDER).glob("incarnation-*-rank-*.json"))


def stacks_path(run_folder: Path, start: int, rank: int) -> Path:
    """Stacks of the threads of a rank that hung."""
    return run_folder / STACKS_FOLDER / f"{_start_and_rank(start, rank)}.txt"


def stacks_paths(run_folder: Path) -> list[Path]:
    """Stacks of all ranks of all starts that have left some; `start_and_rank_of` tells whose each are."""
    return list((run_folder / STACKS_FOLDER).glob("incarnation-*-rank-*.txt"))


def start_and_rank_of(path: Path) -> tuple[int, int]:
    """Numbers of the start and the rank that a path of outcomes/ or stacks/ belongs to."""
    _, start, _, rank = path.stem.split("-")
    return int(start), int(rank)


def _start_and_rank(start: int, rank: int) -> str:
    return f"incarnation-{start:04d}-rank-{rank:05d}"


def samples_path(run_folder: Path, samples: int) -> Path:
    """Picture of what was generated after so many samples; clips have the suffix .mp4 instead."""
    return run_folder / SAMPLES_FOLDER / f"samples-{samples:012d}.png"


def trace_path(run_folder: Path, rank: int) -> Path:
    """Chrome trace of a rank."""
    return run_folder / PROFILE_FOLDER / f"rank-{rank}-trace.json.gz"


def memory_history_path(run_folder: Path, rank: int) -> Path:
    """Allocator history of a rank on CUDA."""
    return run_folder / PROFILE_FOLDER / f"rank-{rank}-memory.pickle"
