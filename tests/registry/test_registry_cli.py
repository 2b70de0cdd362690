from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from registry.api import Registry
from registry.cli import main

RUN = "from registry.cli import main; main(prog_name='lora-registry')"
Invoke = Callable[..., Result]


@pytest.fixture
def invoke(folder: Path) -> Invoke:
    """Run a command on the registry of the test."""

    def run(*arguments: object, location: str | None = str(folder)) -> Result:
        environment = {"LORA_REGISTRY": location}
        return CliRunner(env=environment).invoke(main, [str(word) for word in arguments])

    return run


def fails(result: Result) -> str:
    """The one sentence of a failure."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").rstrip("\n")


def test_from_push_to_pull(
    spawn: Callable[..., subprocess.Popen[str]], lora: Path, folder: Path, tmp_path: Path
) -> None:
    def run(*arguments: object) -> str:
        process = spawn(RUN, *arguments, "--registry", folder)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        return output

    assert run("push", lora, "emoji-ink") == "emoji-ink@1\n"
    assert run("list").splitlines()[1].startswith("emoji-ink  1 ")
    pulled = Path(run("pull", "emoji-ink@1", "--out", tmp_path / "out").rstrip("\n"))
    assert pulled == tmp_path / "out" / "emoji-ink.safetensors"
    assert pulled.read_bytes() == lora.read_bytes()


def test_failure_of_the_real_command(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    process = spawn(RUN, "list")
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors == "error: no registry is named; give --registry DIR or set LORA_REGISTRY\n"


@pytest.mark.parametrize(
    ("command", "slow"),
    [
        (["--help"], {"pydantic", "numpy", "rich", "boto3", "mindspore"}),
        (["list"], {"numpy", "rich", "boto3", "mindspore"}),
    ],
)
def test_slow_imports_are_avoided(
    spawn: Callable[..., subprocess.Popen[str]],
    loras: Registry,
    lora: Path,
    folder: Path,
    command: list[str],
    slow: set[str],
) -> None:
    loras.push("ink", lora)
    location = [] if "--help" in command else ["--registry", folder]
    script = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    _, modules = spawn(script + RUN, *command, *location).communicate()
    assert "registry.cli" in modules.split()
    assert slow.isdisjoint(modules.split())


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_has_an_example(command: str | None) -> None:
    words = [command] if command else []
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    examples = re.split("Examples?:", result.stdout)[1].strip().splitlines()
    assert any(line.strip().startswith(" ".join(["lora-registry", *words])) for line in examples)


def test_no_command_shows_the_help() -> None:
    assert CliRunner().invoke(main, []).stdout == CliRunner().invoke(main, ["--help"]).stdout


def test_push_prints_only_the_reference(invoke: Invoke, lora: Path) -> None:
    result = invoke("push", lora, "ink")
    assert result.stdout == "ink@1\n"
    assert result.stderr.startswith(f"pushed {lora}")


def test_push_with_metrics_and_lineage(
    invoke: Invoke, loras: Registry, lora: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text('{"fid": 41.5, "clip": 0.31}')
    result = invoke(
        *("push", lora, "ink", "--metrics", scores),
        *("--set", "base=sd15", "--set", "digest=1234e567", "--set", "note=a=b", "--json"),
    )
    assert result.exit_code == 0
    manifest = json.loads(result.stdout)
    assert (manifest["name"], manifest["version"]) == ("ink", 1)
    assert manifest["metrics"] == {"fid": 41.5, "clip": 0.31}
    assert manifest["metadata"] == {"base": "sd15", "digest": "1234e567", "note": "a=b"}
    assert manifest == json.loads(loras.resolve("ink").model_dump_json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ('{"fid": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[1, 2]", "should hold a JSON object"),
        ('{"fid": NaN}', "metrics.fid: Input should be a finite number"),
        ('{"fid": 1e999}', "metrics.fid: Input should be a finite number"),
        ('{"fid": "low"}', "metrics.fid: Input should be a valid number, found 'low'"),
        ('{"fid": {"mean": 1}}', "metrics.fid: Input should be a valid number"),
    ],
)
def test_bad_metrics_file(
    invoke: Invoke,
    lora: Path,
    folder: Path,
    tmp_path: Path,
    content: str | bytes | None,
    message: str,
) -> None:
    scores = tmp_path / "scores.json"
    if content is not None:
        scores.write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in fails(invoke("push", lora, "ink", "--metrics", scores))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["base"], "should be KEY=VALUE"),
        (["=sd15"], "should be KEY=VALUE"),
        (["base=sd15", "base=sdxl"], "gives 'base' twice"),
    ],
)
def test_bad_setting(
    invoke: Invoke, lora: Path, folder: Path, settings: list[str], message: str
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    assert message in fails(invoke("push", lora, "ink", *words))
    assert not folder.exists()


def test_pull_prints_the_path(invoke: Invoke, loras: Registry, lora: Path, tmp_path: Path) -> None:
    manifest = loras.push("ink", lora)
    out = tmp_path / "out"
    assert invoke("pull", "ink", "--out", out).stdout == f"{out / 'ink.safetensors'}\n"
    assert json.loads(invoke("pull", "ink@1", "--out", out, "--json").stdout) == {
        "name": "ink",
        "version": 1,
        "path": str(out / "ink.safetensors"),
        "sha256": manifest.files[0].sha256,
        "size": lora.stat().st_size,
    }


def test_pull_overwrite(invoke: Invoke, loras: Registry, lora: Path, tmp_path: Path) -> None:
    loras.push("ink", lora)
    (tmp_path / "ink.safetensors").write_text("mine")
    assert "--overwrite" in fails(invoke("pull", "ink", "--out", tmp_path))
    assert invoke("pull", "ink", "--out", tmp_path, "--overwrite").exit_code == 0
    assert (tmp_path / "ink.safetensors").read_bytes() == lora.read_bytes()


def test_list_is_never_truncated(invoke: Invoke, loras: Registry, lora: Path) -> None:
    metrics = {f"score_{k}_{'x' * 20}": k / 3 for k in range(8)}
    loras.push("a" * 64, lora, metrics=metrics)
    loras.push("ink", lora)
    loras.push("ink", lora)
    header, long_row, short_row = invoke("list").stdout.splitlines()
    assert header.split()[:3] == ["name", "version", "of"]
    assert long_row.startswith("a" * 64)
    assert all(key in long_row for key in metrics)
    assert short_row.split()[:3] == ["ink", "2", "2"]


def test_list_json(invoke: Invoke, loras: Registry, lora: Path) -> None:
    loras.push("ink", lora, metrics={"fid": 50})
    newest = loras.push("ink", lora, metrics={"fid": 41.5})
    assert json.loads(invoke("list", "--json").stdout) == [
        {
            "name": "ink",
            "version": 2,
            "latest": 2,
            "versions": 2,
            "aliases": [],
            "yanked": None,
            "created": f"{newest.created:%Y-%m-%dT%H:%M:%SZ}",
            "size": lora.stat().st_size,
            "metrics": {"fid": 41.5},
        }
    ]


def test_empty_list(invoke: Invoke, folder: Path) -> None:
    invoke("init")
    result = invoke("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "has no models yet" in result.stderr
    assert json.loads(invoke("list", "--json").stdout) == []
    assert "nothing has been pushed to it yet" in fails(invoke("show", "ink"))


def test_show(invoke: Invoke, loras: Registry, lora: Path) -> None:
    lineage = {"base": "sd15", "config": {"rank": 4}, "note": "two\nlines", "steps": 200}
    manifest = loras.push("ink", lora, metrics={"fid": 41.5}, metadata=lineage)
    assert "metadata" not in invoke("show", "ink@1").stdout
    lines = [line.split() for line in invoke("show", "ink@1", "--all").stdout.splitlines()]
    assert lines[0] == ["ink@1"]
    for expected in (
        ["ink.safetensors", f"{lora.stat().st_size}", "B", manifest.files[0].sha256],
        ["fid", "41.5"],
        ["base", "sd15"],
        ["config", '{"rank":', "4}"],
        ["note", '"two\\nlines"'],
        ["steps", "200"],
    ):
        assert expected in lines


def test_show_json_is_the_manifest(invoke: Invoke, loras: Registry, lora: Path) -> None:
    manifest = loras.push("ink", lora, metadata={"base": "sd15"})
    result = invoke("show", "ink", "--json")
    state = {"aliases": [], "yanked": None, "versions": [1]}
    assert json.loads(result.stdout) == {**manifest.model_dump(mode="json"), **state}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "inc"], "did you mean ink?"),
        (["show", "ink@9"], "ink has no version 9; "),
        (["show", "ink@1.0"], "is not a version"),
        (["pull", "Ink", "--out", "."], "is not a model name"),
        (["pull", "ink"], "Missing option '--out'. See 'main pull --help'."),
        (["pull"], "Missing argument 'NAME[@VERSION|@ALIAS|@sha256:…]'."),
        (["show", "ink", "--colour"], "No such option"),
        (["--colour"], "No such option"),
        (["publish"], "No such command 'publish'."),
        (["push", "missing.safetensors", "ink"], "there is no file missing.safetensors"),
    ],
)
def test_bad_command(
    invoke: Invoke, loras: Registry, lora: Path, words: list[str], message: str
) -> None:
    loras.push("ink", lora)
    assert message in fails(invoke(*words))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (None, "no registry is named; give --registry DIR or set LORA_REGISTRY"),
        ("", "no registry is named; give --registry DIR or set LORA_REGISTRY"),
        ("gs://bucket/loras", "gs://bucket/loras is another URL"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [["push", "x.safetensors", "ink"], ["pull", "ink", "--out", "."], ["list"], ["show", "ink"]],
)
def test_bad_location(invoke: Invoke, words: list[str], location: str | None, message: str) -> None:
    assert message in fails(invoke(*words, location=location))


def test_option_prevails_over_environment(
    invoke: Invoke, loras: Registry, lora: Path, folder: Path
) -> None:
    loras.push("ink", lora)
    result = invoke("list", "--registry", folder, "--json", location="/nowhere")
    assert [row["name"] for row in json.loads(result.stdout)] == ["ink"]


def test_debug_adds_the_traceback(invoke: Invoke) -> None:
    result: Any = invoke("list", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: there is no registry at ")
