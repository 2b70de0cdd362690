"""Every solver beside the scheduler of its name in diffusers: `make parity`.

    python tests/parity/test_solvers_against_diffusers.py

prints the values of `solver_cases.GOLDEN`.

Both sides have the same network and start. Timesteps and levels are each side's own, and are
compared too. Schedulers keep their levels and some of their sums in single precision; made to work
in double precision, they differ from ours by rounding alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import cases
import solver_cases
from solver_cases import CASES, GOLDEN, START, noise, ours

from diffusion.schedule import ALPHAS_CUMPROD, SIGMAS, sigmas, zero_terminal
from diffusion.solvers import (
    SOLVERS,
    SPACINGS,
    ddim,
    noise_levels,
    rescale_guidance,
    timesteps,
)

pytestmark = pytest.mark.parity

STEPS = (10, 20, 50)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim.DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "dpm++2m": ("dpmsolver_multistep.DPMSolverMultistepScheduler", {}),
    "euler": ("euler_discrete.EulerDiscreteScheduler", {}),
    "euler-a": ("euler_ancestral_discrete.EulerAncestralDiscreteScheduler", {}),
    "unipc": ("unipc_multistep.UniPCMultistepScheduler", {}),
}
"""With the defaults of diffusers, but DDIM as in the files of Stable Diffusion."""
SINGLE, DOUBLE = 2e-5, 1e-12
"""Largest differences allowed, of the largest value, by the precision of diffusers."""


@contextmanager
def double_precision() -> Iterator[None]:
    """What asks for single precision gets double."""
    import torch

    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(np, "float32", np.float64),
    ):
        yield


def scheduler(name: str, spacing: str | None = None, **options: Any) -> Any:
    path, own = SCHEDULERS[name.removesuffix("-karras")]
    module, kind = path.split(".")
    if SOLVERS[name].karras:
        options["use_karras_sigmas"] = True
    return getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{module}"), kind)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing=spacing or SOLVERS[name].spacing,
        **own,
        **options,
    )


def theirs(
    case: str, prediction_type: str, steps: int, spacing: str | None = None, **options: Any
) -> tuple[Any, np.ndarray]:
    """The scheduler, and where it arrives."""
    import torch

    name, eta = CASES[case]
    made = scheduler(name, spacing, prediction_type=prediction_type, **options)
    made.set_timesteps(steps)
    if hasattr(made, "set_begin_index"):
        # Else one that has its first timestep twice, rounded, begins with the second.
        made.set_begin_index(0)
    x = torch.tensor(START, dtype=torch.float32)[None]
    if name.startswith("euler"):
        # In the variance-exploding form. `init_noise_sigma` would be this for "leading" alone, and
        # otherwise σ, which is 0.2 % less.
        x = x * (made.sigmas[0] ** 2 + 1) ** 0.5
    for i, timestep in enumerate(made.timesteps):
        shown = made.scale_model_input(x, timestep).double().numpy()
        output = torch.tensor(cases.toy_prediction(shown, float(timestep)), dtype=x.dtype)
        fresh = torch.tensor(noise(i), dtype=x.dtype)[None]
        given = {"eta": eta, "variance_noise": fresh} if eta else {}
        # The ancestral scheduler takes no noise, it draws it.
        drawing = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        with mock.patch(drawing, lambda *_, fresh=fresh, **__: fresh):
            x = made.step(output, timestep, x, **given).prev_sample
    return made, x[0].double().numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("case", "spacing"),
    [
        (case, spacing)
        for case, (name, _) in CASES.items()
        for spacing in ((None,) if SOLVERS[name].karras else SPACINGS)
        # Diffusers' DDIM with "linspace" is of two minds, see below.
        if (name, spacing) != ("ddim", "linspace")
    ],
)
def test_solver(case: str, spacing: str | None) -> None:
    name, _ = CASES[case]
    single, double, looked_up = [], [], []
    for prediction_type in cases.PREDICTION_TYPES:
        for steps in STEPS:
            arguments = (case, prediction_type, steps, spacing)
            found = ours(*arguments)
            single.append(difference(found, theirs(*arguments)[1]))
            with double_precision():
                peer, expected = theirs(*arguments)
            double.append(difference(found, expected))
            levels = noise_levels(name, steps, spacing=spacing)
            given = solver_cases.given_timesteps(name, steps, SIGMAS, spacing)
            np.testing.assert_allclose(peer.timesteps.numpy(), given, rtol=1e-12, atol=1e-9)
            if name != "ddim":  # which has no levels of its own
                np.testing.assert_allclose(peer.sigmas.numpy(), levels, rtol=1e-12)
            # As the pipeline finds timesteps from levels: not rounded with Karras' levels.
            given = solver_cases.looked_up(levels[:-1], SIGMAS)
            looked_up.append(difference(ours(*arguments, given=given), expected))
    print(
        f"{case:14} {spacing or 'karras':8}  single precision {max(single):.0e}, "
        f"double {max(double):.0e}, with the pipeline's timesteps {max(looked_up):.0e}"
    )
    assert max(single) <= SINGLE
    assert max(double) <= DOUBLE
    assert max(looked_up) <= (1e-3 if SOLVERS[name].karras else 1e-5)


@pytest.mark.parametrize("prediction_type", cases.PREDICTION_TYPES)
@pytest.mark.parametrize("case", ["ddim", "ddim, eta 1"])
def test_ddim_of_diffusers_with_linspace(case: str, prediction_type: str) -> None:
    """It steps to timestep t − 1000 // steps, and then takes that for the next of its list.

    Ours, made to do that too, arrives where it does.
    """
    _, eta = CASES[case]
    for steps in STEPS:
        with double_precision():
            peer, expected = theirs(case, prediction_type, steps, "linspace")
        given = peer.timesteps.numpy()
        np.testing.assert_array_equal(given, timesteps(steps, "linspace"))
        x = START
        for i, timestep in enumerate(given):
            levels = SIGMAS[[timestep, max(timestep - 1000 // steps, 0)]]
            denoise = solver_cases.denoiser(prediction_type, [timestep])
            x = x * np.sqrt(levels[0] ** 2 + 1)
            x = ddim(denoise, x, levels, lambda _, i=i: noise(i), eta or 0.0)
            x = x / np.sqrt(levels[1] ** 2 + 1)
        assert difference(x, expected) <= DOUBLE
        honest = difference(ours(case, prediction_type, steps, "linspace"), expected)
        print(f"{case} linspace {prediction_type} {steps}: {honest:.0e} from diffusers")
        assert honest <= 1


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_any_number_of_steps(name: str, spacing: str) -> None:
    solver = SOLVERS[name]
    with double_precision():
        peer = scheduler(name, spacing)
        for steps in range(1, 1001):
            peer.set_timesteps(steps)
            expected = peer.timesteps.numpy()
            if spacing == "trailing" and len(expected) > steps:
                # 61 steps and others, by a rounding error: −1 as well.
                assert expected[-1] == -1
                expected = expected[:steps]
            if spacing == "linspace" and steps == 1 and not solver.drop_lowest:
                # One step from the least noise is none: ours is from the most.
                assert expected == 0
                expected = np.array([999])
            try:
                found = timesteps(steps, spacing, solver.drop_lowest, solver.fractional)
            except ValueError:
                # 999 or 1000 steps: the same timestep twice, or number 1000.
                assert steps >= 999
                assert len(set(expected)) < steps or expected[0] == 1000
                continue
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9, err_msg=str(steps))


@pytest.mark.parametrize("case", CASES)
def test_zero_terminal_snr(case: str) -> None:
    name, _ = CASES[case]
    table = sigmas(zero_terminal(ALPHAS_CUMPROD))
    spacing = None if SOLVERS[name].karras else "trailing"
    for steps in STEPS:
        with double_precision():
            _, expected = theirs(case, "v_prediction", steps, spacing, rescale_betas_zero_snr=True)
        found = difference(ours(case, "v_prediction", steps, spacing, table), expected)
        print(f"{case} {steps}: {found:.0e}")
        # DDIM begins at σ = ∞ there and at 4096 here, where x has x₀ / 4096.
        assert found <= (2e-3 if name == "ddim" else 1e-9)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_guidance(phi: float) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, conditional = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8))
    guided = guided * [[[[1.0]]], [[[4.0]]], [[[7.5]]]] + 0.5
    expected = rescale_noise_cfg(torch.tensor(guided), torch.tensor(conditional), phi)
    np.testing.assert_allclose(rescale_guidance(guided, conditional, phi), expected, rtol=1e-12)


def golden() -> dict[tuple[str, str], np.ndarray]:
    with double_precision():
        return {
            (case, prediction_type): theirs(case, prediction_type, solver_cases.STEPS)[1]
            for case in CASES
            for prediction_type in cases.PREDICTION_TYPES
        }


def test_the_golden_values_are_what_diffusers_says() -> None:
    made = golden()
    assert made.keys() == GOLDEN.keys()
    for key, values in made.items():
        np.testing.assert_allclose(values, GOLDEN[key], rtol=0, atol=1e-11, err_msg=str(key))


if __name__ == "__main__":
    for key, values in golden().items():
        print(f"    {key}: ({', '.join(f'{value:.12f}' for value in values)}),")
