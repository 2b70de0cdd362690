"""The whole of a launch, from the request to the published version."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import Any

from launcher.job import WORKER, Job, Request, prepare, write
from launcher.progress import shown_progress
from launcher.publish import Result, publish, read_result
from launcher.supervise import supervise
from launcher.words import dry_run_json, dry_run_text, plan_text, result_text


def launch(request: Request, *, as_json: bool = False, worker: str = WORKER) -> None:
    """Run what is requested; the module `worker` is started on each device.

    The plan, progress and summary go to stderr, the result to stdout. Raises the rooms' own
    errors for bad input, RunFailed and Interrupted.
    """
    job = prepare(request, datetime.now(timezone.utc), worker)
    _tell(plan_text(job))
    if request.dry_run:
        if as_json:
            print(json.dumps(dry_run_json(job), indent=2))
        else:
            print(dry_run_text(job))
        return
    write(job)
    with shown_progress(job.plan) as progress:
        supervise(job, progress)
    result = read_result(job.attempt)
    reference = publish(job, result)
    _tell(result_text(job, result, reference))
    if as_json:
        print(json.dumps(_result_json(job, result, reference), indent=2))
    else:
        print(reference or job.attempt / result.artifact)


def _result_json(job: Job, result: Result, reference: str | None) -> dict[str, Any]:
    return {
        "version": reference,
        "run_folder": str(job.folder),
        "artifact": str(job.attempt / result.artifact),
        "validation_loss": result.validation_loss,
    }


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
