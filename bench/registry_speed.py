"""The registry beside raw boto3 and obstore, on one SeaweedFS server, in turns.

    python -m bench.registry_speed transfers     # 1 × 100 MB and 100 × 1 MB, both ways
    python -m bench.registry_speed list          # 1,000 names × 20 versions
    python -m bench.registry_speed pushes        # 10,000 versions of one name

Each transfer is a process of its own, which says its seconds, CPU seconds and peak memory; ours
includes all digests, the manifest and reading it back.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench import turns
from registry import documents
from registry.api import manifest_key, open_registry
from registry.models import models
from registry.s3 import S3Store
from tests.registry import servers
from tests.registry.fault_proxy import fault_proxy

CLIENTS = ("ours", "boto3", "obstore")
_IMPORTED = {
    "ours": ("boto3", "boto3.s3.transfer", "registry.s3", "registry.draft", "weights.files"),
    "boto3": ("boto3", "boto3.s3.transfer"),
    "obstore": ("obstore.store",),
}
PNG = b"\x89PNG\r\n\x1a\n"


def _boto3() -> tuple[Any, Any]:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"],
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=32,
        ),
    )
    return client, TransferConfig(preferred_transfer_client="classic")


def _obstore() -> Any:
    from obstore.store import S3Store

    return S3Store(
        "loras",
        endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
        region="us-east-1",
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def _lora(path: Path, size: int) -> None:
    """A LoRA of about so many bytes, other ones each time."""
    down = np.random.default_rng().standard_normal((4, max(1, size // 16))).astype(np.float32)
    module = "lora_unet_mid_block_attentions_0_proj_in"
    up = np.ones((8, 4), np.float32)
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}, path)


def _each(work: Callable[[Path], object], files: list[Path]) -> None:
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(work, files))


def transfer(client: str, direction: str, files: list[Path], out: Path) -> None:
    """All files up, or down into `out`."""
    up = direction == "up"
    if client == "ours":
        registry = open_registry("s3://loras/speed")
        if up:
            registry.push("speed", files[0], samples=files[1:])
        else:
            registry.pull("speed", out, everything=True)
    elif client == "boto3":
        s3, config = _boto3()

        def one(file: Path) -> None:
            if up:
                s3.upload_file(str(file), "loras", f"raw/{file.name}", Config=config)
            else:
                s3.download_file("loras", f"raw/{file.name}", str(out / file.name), Config=config)

        _each(one, files)
    else:
        store = _obstore()

        def other(file: Path) -> None:
            if up:
                store.put(f"obstore/{file.name}", file)
                return
            with (out / file.name).open("wb") as target:
                for block in store.get(f"obstore/{file.name}").stream(min_chunk_size=1 << 20):
                    target.write(block)

        _each(other, files)


def one_transfer(client: str, direction: str, folder: Path) -> None:
    """In a process of its own: do it and say what it cost."""
    files = sorted(folder.iterdir())
    with tempfile.TemporaryDirectory() as name:
        for module in _IMPORTED[client]:
            importlib.import_module(module)
        cpu, begun = time.process_time(), time.monotonic()
        transfer(client, direction, files, Path(name))
        seconds = time.monotonic() - begun
    print(json.dumps([seconds, time.process_time() - cpu, turns.peak_memory() / 2**20]))


@contextmanager
def server(folder: Path) -> Iterator[servers.Server]:
    (folder / "server").mkdir()
    with servers.seaweedfs(folder / "server") as found:
        os.environ.update(found.environment)
        os.environ["LORA_REGISTRY_CACHE"] = str(folder / "cache")
        yield found


def transfers(folder: Path, rounds: int) -> None:
    open_registry("s3://loras/speed").create()  # tries what the server does, once
    clients = [
        name for name in CLIENTS if importlib.util.find_spec(_IMPORTED[name][0].split(".")[0])
    ]
    for count, size in ((1, 100_000_000), (100, 1_000_000)):
        found: dict[tuple[str, str], list[list[float]]] = {}
        for turn in range(rounds):
            files = folder / f"files-{count}-{turn}"
            files.mkdir()
            for number in range(count):  # new bytes each time, so that nothing is there already
                if number == 0:
                    _lora(files / "0.safetensors", size)
                else:
                    (files / f"{number}.png").write_bytes(PNG + np.random.default_rng().bytes(size))
            for direction in ("up", "down"):
                for client in clients:
                    shutil.rmtree(folder / "cache" / "blobs", ignore_errors=True)
                    words = ["--one", client, direction, str(files)]
                    command = [sys.executable, "-m", "bench.registry_speed", "transfers", *words]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    found.setdefault((direction, client), []).append(json.loads(done.stdout))
            shutil.rmtree(files)
        for direction in ("up", "down"):
            base = statistics.median(row[0] for row in found[direction, "boto3"])
            for client in clients:
                seconds, cpu, memory = (
                    statistics.median(column)
                    for column in zip(*found[direction, client], strict=True)
                )
                print(
                    f"{count:4} × {size // 1_000_000:3} MB {direction:5} {client:8} "
                    f"{seconds:6.2f} s  {seconds / base:5.2f} of boto3  {cpu:5.2f} CPU s  "
                    f"{memory:5.0f} MiB",
                    flush=True,
                )
            times, peaks = (
                {name: [row[place] for row in found[direction, name]] for name in clients}
                for place in (0, 2)
            )
            what = f"registry, {count} × {size // 1_000_000} MB {direction}"
            turns.keep(
                [
                    turns.figure(what, times["ours"], times["boto3"], "s", "boto3", 1.1),
                    turns.figure(f"{what}, memory", peaks["ours"], peaks["boto3"], "MiB", "boto3"),
                ]
            )


def listing(folder: Path, names: int, versions: int) -> None:
    with fault_proxy(os.environ["AWS_ENDPOINT_URL_S3"], faults={}) as proxy:
        file = folder / "lora.safetensors"
        _lora(file, 1000)
        registry = open_registry("s3://loras/list")

        assert isinstance(registry.store, S3Store)
        store = registry.store

        def fill(number: int) -> None:  # what pushes write, without their checks
            first = registry.push(f"lora-{number:04d}", file)
            for version in range(2, versions + 1):
                manifest = first.model_copy(update={"version": version})
                store.put(manifest_key(first.name, version), documents.sealed(manifest))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fill, range(names)))
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint_url
        for words in ("cold", "cached"):
            if words == "cold":
                os.environ["LORA_REGISTRY_CACHE"] = str(folder / "another-cache")
            proxy.requests.clear()
            begun = time.monotonic()
            command = ["-m", "registry.cli", "list", "--registry", "s3://loras/list"]
            done = subprocess.run(
                [sys.executable, *command], check=True, capture_output=True, text=True
            )
            assert len(done.stdout.splitlines()) == names + 1
            print(
                f"list of {names} names × {versions} versions, {words}: "
                f"{time.monotonic() - begun:.1f} s, {sum(proxy.requests.values())} requests"
            )


def pushes(folder: Path, count: int) -> None:
    with fault_proxy(os.environ["AWS_ENDPOINT_URL_S3"], faults={}) as proxy:
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint_url
        file = folder / "lora.safetensors"
        _lora(file, 1000)
        for location in (str(folder / "registry"), "s3://loras/pushes"):
            registry = open_registry(location)
            registry.push("many", file)
            proxy.requests.clear()
            begun = time.monotonic()
            for _ in range(count):
                registry.push("many", file)
            seconds = time.monotonic() - begun
            requests = sum(proxy.requests.values()) / count
            (model,) = models(registry.store, "many")
            assert model.versions == tuple(range(1, count + 2))
            print(
                f"{count} pushes to {location.split(':')[0][:6]}: {1000 * seconds / count:.1f} ms "
                f"and {requests:.2f} requests each",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=["transfers", "list", "pushes"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", type=int, default=1000)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--pushes", type=int, default=10_000)
    given = parser.parse_args()
    if given.one:
        one_transfer(given.one[0], given.one[1], Path(given.one[2]))
        return
    with tempfile.TemporaryDirectory() as name, server(Path(name)):
        if given.question == "transfers":
            transfers(Path(name), given.rounds)
        elif given.question == "list":
            listing(Path(name), given.names, given.versions)
        else:
            pushes(Path(name), given.pushes)


if __name__ == "__main__":
    main()
