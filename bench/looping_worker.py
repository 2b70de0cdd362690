"""A worker for bench/failures.py: it meets the others and all-reduces until something happens.

Started by bare msrun with the word "bare", or by lora-launch with the folder of an attempt. FAULT
says what happens to rank 1; READY is a folder in which each rank says that it is at work.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

FAULT = os.environ.get("FAULT", "")


def work(rank_id: int, events: Any) -> None:
    if FAULT == "import" and rank_id == 1:
        raise ImportError("no module named torch")
    import numpy as np

    from trainer.distributed import Group

    group = Group("CPU")
    if events is not None:
        events.phase("training")
    for number in range(10**9):
        if events is not None:
            events.beat(mark=number)
        group.sum(np.ones(1000))
        time.sleep(0.02)
        if number == 5:
            (Path(os.environ["READY"]) / str(rank_id)).touch()
        if number == 50 and rank_id == 1:
            if FAULT == "raise":
                raise RuntimeError("a thing that went wrong")
            if FAULT == "exit":
                os._exit(0)
            if FAULT == "sleep":
                time.sleep(10**6)


def run(attempt: Path, rank_id: int) -> None:
    from trainer.events import Events

    events = Events(attempt, rank_id)
    events.phase("starting")
    work(rank_id, events)


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        scheduler = os.environ["MS_ROLE"] == "MS_SCHED"
        work(-1 if scheduler else int(os.environ["RANK_ID"]), None)
    else:
        import trainer.worker as real

        real.run = run
        real.main()
