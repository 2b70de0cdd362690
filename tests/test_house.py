"""The rules of the house: which room imports what, what files say, what Ascend can run.

Imports are read from the source with `ast`, those inside functions too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sampler import efficientnet

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "weights": set(),
    "diffusion": {"weights"},
    "registry": {"weights"},
    "cluster": set(),
    "trainer": {"diffusion", "weights"},
    "sampler": {"diffusion", "weights", "registry", "cluster"},
    "launcher": {"cluster", "trainer", "registry", "diffusion", "weights"},
}
"""Each room and the other rooms it may import."""

WITHOUT_MINDSPORE = ("weights", "registry", "cluster", "launcher")
WITH_MINDSPORE = ("diffusion", "trainer", "sampler")

DISTRIBUTIONS = {
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
    "resvg_py": "resvg-py",
}
"""Distributions whose name is not that of their package."""

# Written so that this file does not match itself.
REGISTRY_HOST = re.compile(
    r"pypi\.org|pythonhosted\.org|npmjs\.(org|com)|yarnpkg\.com|conda\.anaconda\.org"
    r"|download\.pytorch\.org|static\.crates\.io|//mirrors?\.[a-z]|/simple/?\s*$",
    re.MULTILINE,
)
MACHINE_PATH = re.compile(r"(?<![\w.~}$>*-])/(work|tmp|root|home/\w+|Users/\w+)/\w")


# ---- reading the source


@cache
def modules() -> dict[str, Path]:
    """Every module of the rooms and of `assets`, by dotted name."""
    found = {}
    for room in (*MAY_IMPORT, "assets"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@cache
def imported(name: str) -> frozenset[str]:
    """The dotted names a module imports; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: name the package in full"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else ""
            called = function.id if isinstance(function, ast.Name) else called
            argument = node.args[0]
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                found.add(str(argument.value))
    return frozenset(found)


def imported_packages(name: str) -> set[str]:
    return {dotted.partition(".")[0] for dotted in imported(name)}


def path_to_mindspore(name: str, seen: frozenset[str] = frozenset()) -> list[str] | None:
    """The chain of imports that ends in MindSpore, or None."""
    if "mindspore" in imported_packages(name):
        return [name, "mindspore"]
    packages = {dotted.rpartition(".")[0] for dotted in imported(name)} | {name.partition(".")[0]}
    for following in sorted((imported(name) | packages) & modules().keys() - seen - {name}):
        if chain := path_to_mindspore(following, seen | {name}):
            return [name, *chain]
    return None


def of_room(room: str) -> list[str]:
    return [name for name in modules() if name.partition(".")[0] == room]


# ---- who imports whom


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    closed = {*MAY_IMPORT, "assets", "configs", "tests", "bench"} - MAY_IMPORT[room] - {room}
    for name in of_room(room):
        assert not (imported_packages(name) & closed), name


def test_the_rooms_make_no_circle() -> None:
    def above(room: str) -> Iterator[str]:
        for lower in MAY_IMPORT[room]:
            yield lower
            yield from above(lower)

    assert not [room for room in MAY_IMPORT if room in above(room)]


@pytest.mark.parametrize("room", WITHOUT_MINDSPORE)
def test_a_room_without_mindspore_does_not_reach_it_through_others(room: str) -> None:
    chains = [path_to_mindspore(name) for name in of_room(room)]
    assert not [" → ".join(chain) for chain in chains if chain]


def test_importing_the_rooms_without_mindspore_does_not_load_it() -> None:
    names = [name for room in WITHOUT_MINDSPORE for name in of_room(room)]
    names = [name for name in names if not name.endswith("__main__")]
    script = f"import sys, {', '.join(names)}; sys.exit('mindspore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what is declared


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_dependencies_are_what_the_code_imports() -> None:
    foreign = set().union(*map(imported_packages, modules()))
    foreign -= sys.stdlib_module_names | MAY_IMPORT.keys() | {"assets"}
    foreign -= {"mypy_boto3_s3"}  # types only, with the extra `test`
    needed = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in foreign}
    optional = project()["optional-dependencies"]
    extra = {
        canonicalize_name(Requirement(text).name)
        for name in ("recipe", "tensorboard")
        for text in optional[name]
    }
    needed |= {efficientnet.PACKAGE}  # of which the weights are read, and no code is run
    assert {Requirement(text).name for text in project()["dependencies"]} == needed - extra


def test_every_command_has_its_function() -> None:
    for command, target in project()["scripts"].items():
        module, _, function = target.partition(":")
        assert module in modules(), f"{command}: there is no module {module}"
        defined = {getattr(node, "name", None) for node in tree(module).body}
        assert function in defined, f"{command}: {module} defines no {function}"


def test_the_lock_file_pins_every_dependency_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    pins: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement = Requirement(line.partition("--hash")[0])
            assert "--hash=sha256:" in line, f"{requirement.name} has no hash"
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            pins.setdefault(canonicalize_name(requirement.name), set()).add(pin.version)
    extras = project()["optional-dependencies"]
    for wanted in map(Requirement, [*project()["dependencies"], *extras["test"]]):
        versions = pins.get(canonicalize_name(wanted.name))
        assert versions, f"{wanted.name} is not in requirements.lock; run `make lock`"
        assert all(wanted.specifier.contains(version) for version in versions), wanted.name


def test_parity_requirements_are_pinned_and_agree() -> None:
    lines = (ROOT / "requirements-parity.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    extra = {str(Requirement(text)) for text in project()["optional-dependencies"]["parity"]}
    assert extra <= {str(pin) for pin in pins}


# ---- what files say


@cache
def texts() -> dict[str, str]:
    """The text of every file that is or would be committed, by path from the root."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    found = {}
    for name in filter(None, done.stdout.split("\0")):
        try:
            found[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a picture, weights; or removed and not yet committed
    return found


@pytest.mark.parametrize("pattern", [REGISTRY_HOST, MACHINE_PATH], ids=["host", "path"])
def test_no_file_names_a_package_registry_or_a_path_of_one_machine(pattern: re.Pattern) -> None:
    assert not [
        f"{name}, line {text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in texts().items()
        for match in pattern.finditer(text)
    ]


def test_every_asset_folder_carries_its_licence() -> None:
    for folder in (ROOT / "assets").iterdir():
        files = [path for path in folder.rglob("*") if path.suffix not in (".py", ".pyc")]
        if any(path.is_file() for path in files):
            assert (folder / "LICENSE").is_file(), folder.name


# ---- what Ascend can run

HOST_METHODS = {"asnumpy", "item", "tolist", "set_data", "set_dtype", "init_data", "register_hook"}
"""Methods of Tensor and Parameter that are not operators."""


def test_mindspore_mint_is_not_used() -> None:
    for name in modules():
        assert not [dotted for dotted in imported(name) if "mindspore.mint" in dotted], name
        used = (node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute))
        assert not [node.lineno for node in used if node.attr == "mint"], name


def used_operators() -> dict[str, set[str]]:
    """`ops.erf`, `nn.Cell`, `Tensor.reshape` …: everything used, and the modules that do.

    Any call of a method that Tensor has counts as Tensor's, unless it is called on `self` or on
    a module: a few too many rather than one too few.
    """
    from mindspore import Tensor

    used: dict[str, set[str]] = {}
    for name in (name for room in WITH_MINDSPORE for name in of_room(room)):
        if "mindspore" not in imported_packages(name):
            continue
        aliases, namespaces = {"self", "cls", "super"}, {}
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Import):
                aliases |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    dotted, local = f"{node.module}.{alias.name}", alias.asname or alias.name
                    if dotted in ("mindspore.ops", "mindspore.nn"):
                        namespaces[local] = alias.name
                        aliases.add(local)
                    elif node.module in ("mindspore.ops", "mindspore.nn"):
                        kind = node.module.rpartition(".")[2]
                        used.setdefault(f"{kind}.{alias.name}", set()).add(name)
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if owner in namespaces or owner.endswith((".ops", ".nn")):
                    kind = namespaces.get(owner, owner.rpartition(".")[2])
                    used.setdefault(f"{kind}.{node.attr}", set()).add(name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                attribute, owner = node.func.attr, ast.unparse(node.func.value)
                if owner not in aliases and hasattr(Tensor, attribute) and attribute[0] != "_":
                    used.setdefault(f"Tensor.{attribute}", set()).add(name)
    return used


def runs_on_ascend(operator: str, depth: int = 3) -> bool:
    """Does its documentation, or that of the operator it refers to, list Ascend?"""
    import mindspore

    kind, _, attribute = operator.partition(".")
    found = getattr(getattr(mindspore, kind), attribute, None)
    text = found.__doc__ or ""
    platforms = re.findall(r"Supported Platforms:\s+(.+)", text)
    if platforms:
        return any("Ascend" in line for line in platforms)
    others = re.findall(r"`mindspore\.((?:ops|nn|Tensor)\.\w+)", text)
    return depth > 0 and any(runs_on_ascend(other, depth - 1) for other in others)


def test_every_operator_in_use_is_documented_for_ascend() -> None:
    used = used_operators()
    assert len(used) > 10
    operators = {name for name in used if name.partition(".")[2] not in HOST_METHODS}
    lacking = {name: sorted(used[name]) for name in operators if not runs_on_ascend(name)}
    assert not lacking
