"""A worker that keeps the contract of `trainer.worker` and trains nothing; started by msrun.

STAND_IN says what it does in each attempt, "crash,succeed" for example; the last word is for all
further attempts. See the functions below. Only "succeed" meets the other ranks. STAND_IN_RANK is
the rank that fails.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import trainer.worker as real
from diffusion.images import DataError
from trainer.events import Events, write_json

NUMBER = int(Path(sys.argv[1]).name.removeprefix("attempt_"))
WORDS = os.environ["STAND_IN"].split(",")
FAILING = int(os.environ["STAND_IN_RANK"])
BEHAVIOUR = WORDS[min(NUMBER, len(WORDS)) - 1]


def train(events: Events, rank_id: int, mark: int = 2) -> None:
    """Say that training is under way."""
    events.phase("training")
    events.beat(mark=mark)


def forever() -> None:
    while True:
        signal.pause()


def wait(attempt: Path, rank_id: int, events: Events) -> None:
    """Train until ended."""
    train(events, rank_id)
    while True:
        time.sleep(0.2)
        events.beat()


def save(attempt: Path, rank_id: int, events: Events) -> None:
    """Train; save when asked to end, as a real worker does."""

    def stop(*_: object) -> None:
        if rank_id == 0:
            write_json(attempt / "stopped.json", {"step": 4, "steps": 10})
        events.phase("ended")
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    wait(attempt, rank_id, events)


def stubborn(attempt: Path, rank_id: int, events: Events) -> None:
    """Train, and take no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait(attempt, rank_id, events)


def refuse(attempt: Path, rank_id: int, events: Events) -> None:
    """The rank fails with an error of its own, before it has met the others."""
    if rank_id == FAILING:
        raise RuntimeError("no memory for the table")
    forever()


def blame(attempt: Path, rank_id: int, events: Events) -> None:
    """The rank finds that the input is to blame."""
    if rank_id == FAILING:
        raise DataError("a.png: expected an image, found text")
    forever()


def crash(attempt: Path, rank_id: int, events: Events) -> None:
    """The rank is killed while it trains."""
    train(events, rank_id)
    if rank_id == FAILING:
        os.kill(os.getpid(), signal.SIGKILL)
    forever()


def leave(attempt: Path, rank_id: int, events: Events) -> None:
    """The rank ends with a code of its own."""
    train(events, rank_id)
    if rank_id == FAILING:
        print("enough", flush=True)
        os._exit(7)
    forever()


def desert(attempt: Path, rank_id: int, events: Events) -> None:
    """The rank ends as if all were well, but it is not."""
    train(events, rank_id)
    if rank_id == FAILING:
        os._exit(0)
    forever()


def read_slowly() -> None:
    threading.Event().wait()


def hang(attempt: Path, rank_id: int, events: Events) -> None:
    """The rank does not come to the all-reduce in which rank 0 waits."""
    train(events, rank_id, mark=8 if rank_id == FAILING else 9)
    if rank_id == FAILING:
        read_slowly()
    forever()


def spawn(attempt: Path, rank_id: int, events: Events) -> None:
    """Train, with a process of its own in a session of its own."""
    import subprocess

    if rank_id == FAILING:
        child = subprocess.Popen(["sleep", "3000"], start_new_session=True)
        (attempt / "child").write_text(str(child.pid))
    wait(attempt, rank_id, events)


def succeed(attempt: Path, rank_id: int, events: Events) -> None:
    """Meet the others, and end with a result."""
    import numpy as np
    from safetensors.numpy import save_file

    from trainer.distributed import Group
    from trainer.plan import read_plan

    plan = read_plan(attempt)
    group = Group(plan.device_target)
    assert group.rank_id == rank_id
    assert list(group.gather(np.array([rank_id]))[:, 0]) == list(range(plan.devices))
    events.emit("validation", step=0, loss=0.5, quarters=[0.2, 0.4, 0.6, 0.8])
    train(events, rank_id)
    if rank_id:
        return
    for step in range(1, plan.steps + 1):
        images = step * plan.global_batch
        events.emit(
            "step",
            step=step,
            steps=plan.steps,
            images=images,
            loss=1 / step,
            learning_rate=1e-3,
            images_per_second=20.0,
        )
    module, matrix = "lora_unet_mid_block_attentions_0_proj_in", np.ones((2, 2), np.float32)
    tensors = {f"{module}.lora_down.weight": matrix, f"{module}.lora_up.weight": matrix}
    save_file(tensors, attempt / "lora.safetensors")
    result: dict[str, Any] = {
        "artifact": "lora.safetensors",
        "validation_loss": {"base": 0.5, "lora": 0.4},
        "published_step": plan.steps,
        "images": plan.images,
        "steps": plan.steps,
        "skipped_steps": 0,
        "trained_parameters": plan.trained_parameters,
        "synced_bytes": plan.synced_bytes,
        "rank_digests": ["ab" * 32] * plan.devices,
        "base_digest": "cd" * 32,
        "data_digest": "ef" * 32,
        "seconds": {"training": 2.0, "total": 10.0},
        "images_per_second": 20.0,
        "peak_memory_bytes": 1_000_000_000,
        "versions": {"numpy": np.__version__},
    }
    write_json(attempt / "result.json", result)


def run(attempt: Path, rank_id: int) -> None:
    events = Events(attempt, rank_id)
    events.phase("starting")
    globals()[BEHAVIOUR](attempt, rank_id, events)
    events.phase("ended")


def schedule(attempt: Path) -> None:
    """End when the run was stopped, as the real scheduler does when all ranks have left."""
    while not (attempt / "stopped.json").exists():
        time.sleep(0.1)


if __name__ == "__main__":
    real.run = run
    if BEHAVIOUR != "succeed":
        real.schedule = schedule
    real.main()
