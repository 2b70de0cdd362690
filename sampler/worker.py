"""One of several processes that draw: `msrun … -m sampler.worker FOLDER`."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from sampler.spread import end_with_parent


def main() -> None:
    """Draw this process's share of FOLDER/job.json and say so in FOLDER/rank_K.jsonl."""
    end_with_parent()
    folder = Path(sys.argv[1])
    import mindspore as ms
    from mindspore import Tensor, ops
    from mindspore.communication import get_group_size, get_rank, init

    from diffusion.config import ModelConfigError
    from sampler.drawing import draw, from_json, use_device
    from weights.files import WeightsError

    job = from_json((folder / "job.json").read_text(encoding="utf-8"))
    use_device(job.setup.device_target)
    init()
    rank_id, world_size = get_rank(), get_group_size()
    with (folder / f"rank_{rank_id}.jsonl").open("a", encoding="utf-8") as said:

        def tell(path: Path, there: bool) -> None:
            print(json.dumps({"file": str(path), "there": there}), file=said, flush=True)

        try:
            draw(job, tell, slice(rank_id, None, world_size))
        except (ModelConfigError, WeightsError) as error:
            print(json.dumps({"error": str(error)}), file=said, flush=True)
            sys.exit(2)
        except Exception:
            print(json.dumps({"traceback": traceback.format_exc()}), file=said, flush=True)
            raise
    # Whoever is ready first waits: a process that leaves ends the others' meeting point.
    ops.AllReduce()(Tensor([1.0], ms.float32)).asnumpy()


if __name__ == "__main__":
    main()
