"""``lora-launch``: fine-tune on this machine's devices and publish the LoRA."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from launcher.doctor_command import doctor
from launcher.rank_table import rank_table
from launcher.report_command import report
from launcher.status_command import logs, status
from launcher.submit_command import submit
from registry.command_line import OneSentenceGroup


class Launch(OneSentenceGroup):
    """A group whose bare form, `lora-launch [OPTIONS] CONFIG`, is its command `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] != "--help" and args[0] not in self.commands):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        run = self.commands["run"]
        run.format_help(click.Context(run, info_name=ctx.info_name), formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=Launch)
def main() -> None:
    """Fine-tune on this machine's devices and publish the LoRA."""


main.add_command(doctor)
main.add_command(submit)
main.add_command(rank_table)
main.add_command(status)
main.add_command(logs)
main.add_command(report)


@main.command(hidden=True)
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option(
    "--devices",
    metavar="N|IDS",
    help="A number (8), a range (0-3) or a list (4,5,6,7) of devices. Default: every NPU; on CPU "
    "one worker, which uses all cores.",
)
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a value of CONFIG, such as lora.rank=8; may be repeated.",
)
@click.option(
    "--device-target",
    type=click.Choice(["auto", "CPU", "Ascend"]),
    default="auto",
    show_default=True,
    help="What to run on; auto is Ascend if the machine has an NPU.",
)
@click.option(
    "--master-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Port of msrun's scheduler, default: one that is free; with --nnodes the port where the "
    "nodes meet, default: 28118, and msrun takes one above it.",
)
@click.option(
    "--nnodes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of machines, each with as many devices. Default: what Slurm or Kubernetes say.",
)
@click.option(
    "--node-rank",
    type=click.IntRange(min=0),
    metavar="K",
    help="Which of them this is; node 0 publishes.",
)
@click.option("--master-addr", metavar="HOST", help="Name or address of node 0.")
@click.option(
    "--product",
    type=click.Choice(["910A", "A2", "A3"], case_sensitive=False),
    help="What the NPUs are; A2 has 910B1 to 910B4. Default: as npu-smi says.",
)
@click.option(
    "--rank-table",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Use this rank table. Default: the one that Kubernetes has mounted, else one is made if "
    "the devices have addresses.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="How often a run that failed goes on by itself from its last checkpoint; ten minutes of "
    "training give all of them back.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on with the run in this folder, from its last checkpoint; CONFIG is then its own.",
)
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Resume although base, data or config are not what they were.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Serve metrics of this node's ranks to Prometheus; 0 takes a free port. Default: none.",
)
@click.option(
    "--metrics-host",
    default="127.0.0.1",
    show_default=True,
    help="Address to serve them on; 0.0.0.0 lets other machines scrape.",
)
@click.option(
    "--metrics-token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Serve them to who has the bearer token in this file.",
)
@click.option(
    "--metrics-certificate",
    type=click.Path(path_type=Path),
    metavar="PEM",
    help="Serve them over TLS, with this certificate and --metrics-key.",
)
@click.option("--metrics-key", type=click.Path(path_type=Path), metavar="PEM", help="Its key.")
@click.option(
    "--require-metrics",
    is_flag=True,
    help="Do not train if they cannot be served; otherwise it is a warning.",
)
@click.option(
    "--push-gateway",
    metavar="URL",
    help="Send them to this Pushgateway every 15 seconds, from nodes that cannot be scraped.",
)
@click.option(
    "--estimate",
    is_flag=True,
    help="With --dry-run: time, memory and bytes on the wire on 910A and 910B.",
)
@click.option("--dry-run", is_flag=True, help="Print plan and command; write and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def run(
    config: Path | None,
    devices: str | None,
    overrides: Sequence[str],
    device_target: str,
    master_port: int | None,
    nnodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    product: str | None,
    rank_table: Path | None,
    max_restarts: int,
    resume: Path | None,
    accept_changes: bool,
    metrics_port: int | None,
    metrics_host: str,
    metrics_token_file: Path | None,
    metrics_certificate: Path | None,
    metrics_key: Path | None,
    require_metrics: bool,
    push_gateway: str | None,
    estimate: bool,
    dry_run: bool,
    as_json: bool,
    debug: bool,
) -> int:
    """Fine-tune as CONFIG says, one process per device, and publish the LoRA.

    Prints NAME@VERSION, or the file if CONFIG names no registry. Exit code: 0 published, 2 bad
    input, 75 stopped and saved, 130 and 143 interrupted by Ctrl-C or SIGTERM, which save too;
    otherwise that of the rank that failed first, 128 + N if signal N killed it. --resume goes on.

    \b
    Example:
      lora-launch --devices 2 configs/runs/emoji-ink.yaml
      lora-launch --devices 0-3 --set lora.rank=16 --dry-run --estimate my.yaml
      lora-launch --devices 8 --max-restarts 3 my.yaml
      lora-launch --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 my.yaml
      lora-launch --devices 2 --resume runs/emoji-ink-20260101-120000
    """
    # Only here, so that --help does not wait for them.
    from cluster.mounted_table import PATH as MOUNTED
    from cluster.mounted_table import read_when_complete
    from cluster.nodes import this_node
    from launcher.errors import Interrupted, RunFailed, Stopped
    from launcher.request import Request, Scraping
    from launcher.run import launch

    if estimate and not dry_run:
        raise click.UsageError(
            "--estimate needs --dry-run: nothing is estimated of a run that runs."
        )
    target = None if device_target == "auto" else device_target
    try:
        mounted = read_when_complete()
        if rank_table is None and mounted is not None:
            rank_table = MOUNTED
        launch(
            Request(
                config,
                overrides,
                devices,
                target,
                master_port,
                resume,
                this_node(os.environ, nnodes, node_rank, master_addr, mounted),
                max_restarts,
                product,
                rank_table,
                accept_changes,
                dry_run,
                estimate,
                Scraping(
                    metrics_port,
                    metrics_host,
                    metrics_token_file,
                    metrics_certificate,
                    metrics_key,
                    require_metrics,
                    push_gateway,
                ),
            ),
            as_json=as_json,
        )
    except (Interrupted, Stopped) as ended:
        return _report(ended, ended.exit_code)
    except RunFailed as failed:
        if failed.failure.traceback and (debug or not failed.failure.user):
            click.echo(failed.failure.traceback, err=True)
        return _report(failed, failed.failure.exit_code)
    except _input_errors() as error:
        if debug:
            traceback.print_exc()
        return _report(error, 2)
    return 0


@main.command("data-check")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a value of CONFIG, such as data.shapes=5; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def data_check(config: Path, overrides: Sequence[str], as_json: bool, debug: bool) -> int:
    """Look at every image and caption of CONFIG, and train nothing.

    Prints sizes, shapes, what is odd, and every file that cannot be trained on. The base's weights
    need not be there. Exit code: 0 all can be trained on, 2 some cannot.

    \b
    Example:
      lora-launch data-check configs/runs/emoji-ink.yaml
      lora-launch data-check --set data.shapes=5 my.yaml
    """
    import json

    from launcher.data_check import check_data
    from trainer.check import report_text

    try:
        found = check_data(config, overrides)
    except _input_errors() as error:
        if debug:
            traceback.print_exc()
        return _report(error, 2)
    text = json.dumps(found.as_dict(), indent=2) if as_json else report_text(found)
    click.echo(text)
    return 2 if found.problems else 0


def _input_errors() -> tuple[type[Exception], ...]:
    """What the rooms raise for bad input, each with one sentence for the user."""
    from cluster.errors import ClusterError
    from diffusion.config import ModelConfigError
    from diffusion.images import DataError
    from launcher.errors import LaunchError
    from registry.errors import RegistryError
    from trainer.config import ConfigError
    from weights.files import WeightsError

    return (
        ClusterError,
        ConfigError,
        DataError,
        LaunchError,
        ModelConfigError,
        RegistryError,
        WeightsError,
    )


def _report(error: Exception, exit_code: int) -> int:
    click.echo(f"error: {error}", err=True)
    return exit_code


if __name__ == "__main__":
    main()
