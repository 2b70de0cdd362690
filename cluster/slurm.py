"""The batch script of a run on several machines, for Slurm's sbatch(1)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError

# 75: stopped and saved; 143: ended by SIGTERM, which saves too.
_PROGRAM = """\
runs=$output/slurm-$SLURM_JOB_ID
newest=
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  newest=$(ls -1t "$runs"/*/checkpoints/step_*.safetensors 2>/dev/null | head -n 1)
fi
if [ -n "$newest" ]; then
  launch+=(--resume "${newest%/checkpoints/*}")
else
  launch+=(--set "output=$runs" "$config")
fi

# The step is signalled by Slurm; this shell only has to outlive it.
trap : TERM
srun --kill-on-bad-exit=1 --cpu-bind=none "${launch[@]}" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  code=$?
done

# The job still runs: what ended the step was the warning before the time limit.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ] && { [ "$code" -eq 75 ] || [ "$code" -eq 143 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class SlurmJob:
    """One submission, its names checked; all paths absolute and on storage that all nodes share."""

    name: str
    nodes: int
    folder: str
    """Where the command runs, so that relative paths of the config stay right."""
    config: str
    output: str
    """Folder in which the job makes one for its runs, by its number."""
    log: str
    """Where Slurm writes what the command says; %j is the job's number."""
    launch: Sequence[str]
    """lora-launch with its options."""
    partition: str | None = None


def script(job: SlurmJob) -> str:
    """The text for sbatch: one task on each node, which starts that node's workers.

    A job that is requeued, be it pre-empted, out of time or by hand, goes on from its last
    checkpoint. SIGTERM comes without "B:": sent to the shell it would have to be passed on to
    srun, which answers it by killing the step. Raises ClusterError if the log cannot be named in
    a directive.
    """
    if not re.fullmatch(r"[\w./%+@:-]+", job.log, re.ASCII):
        raise ClusterError(
            f"--out: expected a folder without spaces or other special characters, found the log "
            f"{job.log!r}; #SBATCH lines cannot hold them, name another folder"
        )
    directives = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "partition": job.partition,
        "exclusive": "",
        "requeue": "",
        "signal": "TERM@60",
        "open-mode": "append",
        "output": job.log,
    }
    values = {"config": job.config, "output": job.output}
    return "\n".join(
        [
            "#!/bin/bash",
            *(
                f"#SBATCH --{name}" + (f"={value}" if value else "")
                for name, value in directives.items()
                if value is not None
            ),
            "",
            f"cd {shlex.quote(job.folder)} || exit",
            *(f"{name}={shlex.quote(value)}" for name, value in values.items()),
            f"launch=({shlex.join(job.launch)})",
            _PROGRAM,
        ]
    )
