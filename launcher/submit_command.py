"""The command `lora-launch submit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["kubernetes", "slurm"]), help="What runs the job.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Machines.")
@click.option(
    "--devices-per-node",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Workers on each machine.",
)
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a value of CONFIG; may be repeated.",
)
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("submitted"),
    show_default=True,
    help="Where the files are written.",
)
@click.option(
    "--kind",
    type=click.Choice(["ascendjob", "volcano"]),
    default="ascendjob",
    show_default=True,
    help="Kubernetes: a job of MindCluster's ascend-operator or of Volcano.",
)
@click.option(
    "--product",
    type=click.Choice(["910A", "A2", "A3"]),
    default="A2",
    show_default=True,
    help="Kubernetes: the servers to ask for.",
)
@click.option("--image", metavar="IMAGE", help="Kubernetes: an image with lora-launch in it.")
@click.option(
    "--namespace",
    metavar="NAME",
    default="default",
    show_default=True,
    help="Kubernetes: where the job, its claims and Secrets are.",
)
@click.option(
    "--volume",
    "volumes",
    metavar="CLAIM:PATH",
    multiple=True,
    help="Kubernetes: a claim and where it appears; one holds `output`. May be repeated.",
)
@click.option(
    "--secret",
    "secrets",
    metavar="NAME",
    multiple=True,
    help="Kubernetes: a Secret whose keys become environment variables. May be repeated.",
)
@click.option("--partition", metavar="NAME", help="Slurm: the partition. Default: Slurm's own.")
@click.option("--apply", "apply_it", is_flag=True, help="Send the job too: kubectl or sbatch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def submit(apply_it: bool, as_json: bool, **options: Any) -> None:
    """Write CONFIG as a job of Kubernetes or Slurm, for several machines.

    Prints the files, or with --apply what kubectl or sbatch answers. A job that is pre-empted or
    restarted goes on from its last checkpoint. Exit code: 0 written, 2 bad input or not taken.

    \b
    Example:
      lora-launch submit --to slurm --nodes 2 --partition npu --apply my.yaml
      lora-launch submit --to kubernetes --nodes 2 --image example/lora:1 \\
          --volume loras:/data --set output=/data/runs my.yaml
    """
    import json
    from datetime import datetime, timezone

    from cluster.errors import ClusterError
    from launcher.errors import LaunchError
    from launcher.submit import SubmitRequest, plan_submission, send, write
    from trainer.config import ConfigError

    if options["to"] is None:  # click would list the choices on lines of their own
        raise click.UsageError("--to: expected kubernetes or slurm, found nothing; name one.")
    try:
        request = SubmitRequest(**options)
        submission = plan_submission(request, datetime.now(timezone.utc))
        for note in submission.notes:
            click.echo(f"note: {note}", err=True)
        write(submission)
        answer = send(submission) if apply_it else None
    except (ClusterError, ConfigError, LaunchError) as error:
        raise click.ClickException(str(error)) from error
    files: Sequence[str] = [str(path) for path in submission.files]
    if as_json:
        said = {"job": submission.job, "files": files, "command": list(submission.command)}
        click.echo(json.dumps({**said, "answer": answer}, indent=2))
    else:
        click.echo(answer if answer is not None else "\n".join(files))
