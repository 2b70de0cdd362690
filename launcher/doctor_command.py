"""The command `lora-launch doctor`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(config: Path | None, as_json: bool) -> int:
    """Look at this machine, and say what would keep a run from going well.

    With CONFIG also at its folders and its registry. Nothing is started and nothing stays written.
    Exit code: 0 fit, warnings or not; 1 a problem; 2 bad input.

    \b
    Example:
      lora-launch doctor
      lora-launch doctor --json my.yaml
    """
    import json
    import os

    from cluster.checks import exit_code
    from cluster.errors import ClusterError
    from launcher.doctor import as_dict, examine, text
    from trainer.config import ConfigError
    from trainer.config_file import load_config

    try:
        findings = examine(None if config is None else load_config(config), os.environ)
    except (ClusterError, ConfigError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(as_dict(findings), indent=2) if as_json else text(findings))
    return exit_code(findings)
