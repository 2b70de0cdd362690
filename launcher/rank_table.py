"""`lora-launch rank-table`: make, merge, check and explain the tables that HCCL reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import ClusterError

_PRODUCT = click.option(
    "--product",
    type=click.Choice(["910A", "A2", "A3"]),
    help="What the NPUs are; its rules are then applied.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_OUT = click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the table there, whole or not at all. Default: stdout.",
)


if TYPE_CHECKING:
    from cluster.ranktable import Server


class _Tables(click.Group):
    """A group whose commands raise ClusterError for bad input."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ClusterError as error:
            raise click.ClickException(str(error)) from error


@click.group("rank-table", cls=_Tables)
def rank_table() -> None:
    """Make, merge, check and explain rank tables.

    lora-launch makes the table of a run by itself; these are for tables of other tools, and to
    look. docs/rank-tables.md has the rules.
    """


@rank_table.command()
@click.option("--devices", metavar="N|IDS", help="As for lora-launch. Default: every NPU.")
@_PRODUCT
@click.option(
    "--server-id", metavar="NAME", help="Name of this machine. Default: its address on a network."
)
@click.option(
    "--hosts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A YAML file that describes all machines, instead of this one.",
)
@click.option(
    "--gather",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Add this machine's part in a shared folder and give the table of all --nnodes.",
)
@click.option("--nnodes", type=click.IntRange(min=1), metavar="N", help="Machines, for --gather.")
@click.option("--node-rank", type=click.IntRange(min=0), metavar="K", help="Which of them this is.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long --gather waits for the other machines.",
)
@_OUT
def generate(
    devices: str | None,
    product: str | None,
    server_id: str | None,
    hosts: Path | None,
    gather: Path | None,
    nnodes: int | None,
    node_rank: int | None,
    wait: float,
    out: Path | None,
) -> None:
    """Make the table of this machine, of all in a host file, or of all that come to a folder.

    Addresses are those of /etc/hccn.conf or, where it lacks them, of hccn_tool.

    \b
    Example:
      lora-launch rank-table generate --devices 8 --out rank_table.json
      lora-launch rank-table generate --hosts hosts.yaml --out rank_table.json
      lora-launch rank-table generate --gather /shared/run1 --nnodes 2 --node-rank 0
    """
    from cluster import table_parts
    from cluster.host_file import read_hosts

    if hosts is not None:
        told, members = read_hosts(hosts)
        _put(table_parts.checked_table(members, product or told), out)
        return
    if gather is None:
        _put(table_parts.checked_table([_this(devices, product, server_id)], product), out)
        return
    if nnodes is None or node_rank is None or node_rank >= nnodes:
        raise click.UsageError(
            "--gather needs --nnodes and --node-rank, which counts from 0 to nnodes - 1"
        )
    own = _this(devices, product, server_id)
    path = table_parts.gather(gather, nnodes, node_rank, own, wait, product)
    _put(path.read_text(encoding="utf-8"), out)


@rank_table.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@_PRODUCT
@_OUT
def merge(parts: Sequence[Path], product: str | None, out: Path | None) -> None:
    """Make one table of several; ranks are numbered anew, in the order of PARTS.

    \b
    Example:
      lora-launch rank-table merge node0.json node1.json --out rank_table.json
    """
    from cluster import table_parts

    members = [server for part in parts for server in table_parts.servers(part)]
    _put(table_parts.checked_table(members, product), out)


@rank_table.command()
@click.argument("table", type=click.Path(path_type=Path))
@_PRODUCT
@click.option(
    "--roce", is_flag=True, help="Check as if HCCL_INTRA_ROCE_ENABLE=1 were set where it runs."
)
@_JSON
def check(table: Path, product: str | None, roce: bool, as_json: bool) -> int:
    """Say what HCCL would refuse in TABLE, with its error codes, and what is odd.

    Without --product a table is right if some product takes it. Exit code: 0 right, 2 not.

    \b
    Example:
      lora-launch rank-table check rank_table.json
      lora-launch rank-table check --product 910A --json hccl_8p.json
    """
    from cluster.table_check import check_file
    from cluster.table_text import findings

    report = check_file(table, product, roce)
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else findings(str(table), report))
    return 2 if report.problems else 0


@rank_table.command()
@click.argument("table", type=click.Path(path_type=Path))
@_JSON
def explain(table: Path, as_json: bool) -> None:
    """Show which rank is which device of which server, and the products that TABLE fits.

    \b
    Example:
      lora-launch rank-table explain rank_table.json
    """
    from cluster.table_check import check_file
    from cluster.table_text import describe, explanation

    report = check_file(table)
    text = json.dumps(describe(report), indent=2) if as_json else explanation(str(table), report)
    click.echo(text)


def _this(devices: str | None, product: str | None, server_id: str | None) -> Server:
    from cluster.devices import parse_devices, this_machine
    from cluster.server import this_server

    machine = this_machine()
    if machine.device_target != "Ascend":
        raise ClusterError(
            "expected /dev/davinci0 and so on, found no NPU that is visible; check the driver, or "
            "describe the servers in a file and name it with --hosts"
        )
    ids = parse_devices(devices, machine)
    return this_server(ids, product, server_id)


def _put(text: str, out: Path | None) -> None:
    from cluster.files import write_whole
    from cluster.ranktable import path_problem

    if out is None:
        sys.stdout.write(text)
        return
    problem = path_problem(out.absolute())
    if problem:
        raise ClusterError(f"{out}: {problem}")
    write_whole(out, text)
    click.echo(out)
