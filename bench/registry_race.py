"""Many processes push one name at once, through faults and kills: is every version right?

    python -m bench.registry_race --server seaweedfs --faults

Prints a line for the run, and exits with 1 if a version is missing, doubled, damaged or not
numbered one after the other.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from registry.api import Registry, open_registry
from tests.registry import servers
from tests.registry.fault_proxy import FaultProxy, fault_proxy

PUSHER = """
import sys, uuid
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from registry.api import RegistryError, open_registry
location, folder, wanted = sys.argv[1:]
registry = open_registry(location)
done = 0
while done < int(wanted):
    path = Path(folder, f"{uuid.uuid4().hex}.safetensors")
    weights = np.random.standard_normal((4, 64)).astype(np.float32)
    module = "lora_unet_mid_block_attentions_0_proj_in"
    up = np.ones((8, 4), np.float32)
    save_file({f"{module}.lora_down.weight": weights, f"{module}.lora_up.weight": up}, path)
    push_id = uuid.uuid4().hex
    try:
        version = registry.push("raced", path, push_id=push_id).version
    except RegistryError as error:
        print("failed", str(error).replace(chr(10), " "), flush=True)
        continue
    finally:
        path.unlink()
    done += 1
    print("pushed", version, push_id, flush=True)
"""


_SPARED = 2
"""So few that are left are not killed: they would not get as far as to push once."""


class Pushers:
    """Processes that push; one that was killed is followed by another that does the rest."""

    def __init__(self, location: str, folder: Path, processes: int, pushes: int):
        self.location, self.folder = location, folder
        self.reported: dict[str, int] = {}
        self.failed: list[str] = []
        self.killed = 0
        self._left = [pushes] * processes
        self._running: list[subprocess.Popen[bytes] | None] = [None] * processes
        self._lock = threading.Lock()

    def run(self, kill_every: float | None) -> None:
        """Until all have pushed what they should."""
        readers = [threading.Thread(target=self._follow, args=(n,)) for n in range(len(self._left))]
        for reader in readers:
            reader.start()
        chosen = random.Random(0)
        while any(reader.is_alive() for reader in readers):
            time.sleep(kill_every or 0.2)
            if kill_every:
                with self._lock:
                    alive = [p for p in self._running if p is not None and p.poll() is None]
                if len(alive) > _SPARED:
                    chosen.choice(alive).kill()
                    self.killed += 1

    def _follow(self, number: int) -> None:
        while self._left[number] > 0:
            said = self.folder / f"said-{number}-{self._left[number]}-{time.monotonic_ns()}"
            with said.open("wb") as output:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-c", PUSHER),
                        *(self.location, self.folder, str(self._left[number])),
                    ],
                    stdout=output,
                )
            with self._lock:
                self._running[number] = process
            process.wait()
            for line in said.read_text().splitlines(keepends=True):
                word, *rest = line.split()
                if word == "pushed" and line.endswith("\n"):
                    self.reported[rest[1]] = int(rest[0])
                    self._left[number] -= 1
                elif word == "failed":
                    self.failed.append(" ".join(rest))


def problems(registry: Registry, reported: dict[str, int]) -> list[str]:
    """What is wrong with what is there, given the versions by push id that were reported."""
    found = []
    versions = registry.versions("raced")
    if versions != list(range(1, len(versions) + 1)):
        found.append(f"the versions are not one after the other: {versions}")
    manifests = {}
    for manifest in registry.manifests([("raced", v) for v in versions], fresh=True):
        manifests[manifest.version] = manifest
        registry.check(manifest)
    count = collections.Counter(manifest.push_id for manifest in manifests.values())
    found += [f"the push {push_id} is there {n} times" for push_id, n in count.items() if n > 1]
    for push_id, version in reported.items():
        if version not in manifests or manifests[version].push_id != push_id:
            found.append(f"version {version} is not the push {push_id} that was told so")
    return found


@contextlib.contextmanager
def place(
    server: str, faults: bool, share: float, folder: Path
) -> Iterator[tuple[str, FaultProxy | None]]:
    """Where to push; sets what the environment needs."""
    os.environ["LORA_REGISTRY_CACHE"] = str(folder / "cache")
    if server == "folder":
        yield str(folder / "registry"), None
        return
    (folder / "server").mkdir()
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(getattr(servers, server)(folder / "server"))
        os.environ.update(running.environment)
        proxy = None
        if faults:
            proxy = stack.enter_context(fault_proxy(running.endpoint_url, share=share))
            os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint_url
        yield "s3://loras/race", proxy
        os.environ.update(running.environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--server", choices=["folder", "seaweedfs", "ceph", "rclone"], default="folder"
    )
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--pushes", type=int, default=64)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--kill-every", type=float, default=0.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with place(given.server, given.faults, given.share, folder) as (location, proxy):
            pushers = Pushers(location, folder, given.processes, given.pushes)
            begun = time.monotonic()
            pushers.run(given.kill_every or None)
            seconds = time.monotonic() - begun
            if proxy is not None:
                proxy.faults.clear()
            registry = open_registry(location)
            found = problems(registry, pushers.reported)
            versions = len(registry.versions("raced"))
        faults = sum(proxy.done.values()) if proxy else 0
        requests = f", {sum(proxy.requests.values())} requests" if proxy else ""
        print(
            f"{given.server}: {len(pushers.reported)} pushes reported, {versions} versions, "
            f"{pushers.killed} processes killed, {faults} faults{requests}, "
            f"{len(pushers.failed)} pushes reported as failed, {seconds:.0f} s, "
            f"{len(found)} problems"
        )
        for reason, count in collections.Counter(pushers.failed).most_common(5):
            print(f"  failed {count} times: {reason[:300]}")
        if proxy:
            print("  faults:", dict(proxy.done))
        print("\n".join(found[:20]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
