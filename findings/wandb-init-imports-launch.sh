#!/usr/bin/env bash
# wandb 0.31.0: wandb.init imports wandb's Launch (agents, queues, sweeps) and its public API, though nothing uses them.
#
# Not `import wandb` does that, but the first init, in mode offline as well: to ask whether inputs of a job were staged, it
# imports wandb.sdk.launch.inputs.internal, whose package imports the rest, about 100 modules. That is most of the processor
# time of init (0.3 of 0.4 s, half of what `import wandb` takes), as the second process shows, which has imported it before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q wandb==0.31.0
cd "$work"
export WANDB_MODE=offline WANDB_SILENT=true WANDB_DIR="$work"
cat >start.py <<'PYTHON'
import json
import sys
import time


def took(action):
    """Processor seconds of an action, and the modules that it imported."""
    before, start = set(sys.modules), time.process_time()
    action()
    return time.process_time() - start, sorted(set(sys.modules) - before)


def library():
    import wandb


def launch():
    import wandb.sdk.launch.inputs.internal


def init():
    import wandb

    wandb.init(project="findings", settings=wandb.Settings(console="off"))


actions = {"library": library, "launch": launch, "init": init}
print(json.dumps([took(actions[name]) for name in sys.argv[1:]]))
PYTHON
venv/bin/python start.py library init >warm-up # writes bytecode, which is not to be measured
venv/bin/python start.py library init >plain
venv/bin/python start.py library launch init >prepared
venv/bin/python - <<'PYTHON'
import json
import sys
from importlib.metadata import version


def launch_in(modules):
    return sum(name.startswith("wandb.sdk.launch") for name in modules)


def api_in(modules):
    return sum(name.startswith("wandb.apis.public") for name in modules)


print(f"wandb {version('wandb')}: processor time and modules imported, of them of wandb.sdk.launch and wandb.apis.public")
plain, prepared = json.load(open("plain")), json.load(open("prepared"))
for names, steps in (("import wandb", "init"), plain), (("import wandb", "import launch", "init after that"), prepared):
    for name, (seconds, modules) in zip(names, steps):
        print(f"  {name:16} {seconds:5.2f} s  {len(modules):4} modules: {launch_in(modules):3} {api_in(modules):3}")
(_, of_import), (_, of_init) = plain
unused = "wandb.sdk.launch.agent.agent" in of_init and "wandb.sdk.launch.sweeps.scheduler" in of_init
as_found = launch_in(of_import) == api_in(of_import) == 0 and unused and api_in(of_init) > 20
print("as found" if as_found else "CHANGED: wandb.init no longer imports Launch")
sys.exit(0 if as_found else 1)
PYTHON
