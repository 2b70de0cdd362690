"""A worker that keeps the contract of `trainer.worker` and trains nothing; started by msrun.

STAND_IN says what it does: "succeed"; "raise" an error on rank 1 before it has met the others;
"wait" in training until it is ended; "save" when it is asked to end, as `trainer.worker` does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

ATTEMPT = Path(sys.argv[1])
BEHAVIOUR = os.environ["STAND_IN"]


def emit(event: str, **values: object) -> None:
    with (ATTEMPT / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, **values, "time": time.time()}) + "\n")


def succeed() -> None:
    import numpy as np
    from safetensors.numpy import save_file

    plan = json.loads((ATTEMPT / "plan.json").read_text())
    emit("validation", step=0, loss=0.5, quarters=[0.2, 0.4, 0.6, 0.8])
    emit("phase", phase="training")
    for step in range(1, plan["steps"] + 1):
        images = step * plan["global_batch"]
        emit(
            "step",
            step=step,
            steps=plan["steps"],
            images=images,
            loss=1 / step,
            learning_rate=1e-3,
            images_per_second=20.0,
        )
    save_file({"down": np.ones((2, 2), np.float32)}, ATTEMPT / "lora.safetensors")
    result = {
        "artifact": "lora.safetensors",
        "validation_loss": {"base": 0.5, "lora": 0.4},
        "published_step": plan["steps"],
        "images": plan["images"],
        "steps": plan["steps"],
        "skipped_steps": 0,
        "trained_parameters": plan["trained_parameters"],
        "synced_bytes": plan["synced_bytes"],
        "rank_digests": ["ab" * 32] * plan["devices"],
        "base_digest": "cd" * 32,
        "data_digest": "ef" * 32,
        "seconds": {"training": 2.0, "total": 10.0},
        "images_per_second": 20.0,
        "peak_memory_bytes": 1_000_000_000,
        "versions": {"numpy": np.__version__},
    }
    (ATTEMPT / "result.json").write_text(json.dumps(result))


def fail(rank_id: int) -> None:
    report = {
        "rank_id": rank_id,
        "type": "RuntimeError",
        "message": "no memory for the table",
        "user": False,
        "traceback": "Traceback (most recent call last): ...",
    }
    part = ATTEMPT / "errors" / "part"
    part.write_text(json.dumps(report))
    part.replace(ATTEMPT / "errors" / f"rank_{rank_id}.json")
    sys.exit(1)


def stop(*_: object) -> None:
    (ATTEMPT / "stopped.json").write_text(json.dumps({"step": 4, "steps": 10}))
    sys.exit(0)


def main() -> None:
    scheduler = os.environ["MS_ROLE"] == "MS_SCHED"
    if BEHAVIOUR == "raise" and not scheduler and os.environ["RANK_ID"] == "1":
        fail(1)

    import mindspore
    from mindspore.communication import get_rank, init

    if BEHAVIOUR == "save" and not scheduler:
        signal.signal(signal.SIGTERM, stop)
    mindspore.set_device("CPU")
    init()
    if get_rank() == 0:
        emit("phase", phase="loading base")
    if BEHAVIOUR in ("wait", "save"):
        if get_rank() == 0:
            emit("phase", phase="training")
        while True:
            signal.pause()
    if get_rank() == 0:
        succeed()


if __name__ == "__main__":
    main()
