"""The names and shapes of the networks are those of the networks that MindSpore builds."""

from __future__ import annotations

import pytest

from diffusion.config import load_model_config
from tests.weights import made
from weights import structure
from weights.files import WeightsError


@pytest.mark.parametrize("model", ["sd15", "sd20", "emoji"])
@pytest.mark.parametrize("network", structure.NETWORKS)
def test_the_shapes_are_those_of_the_mindspore_network(model: str, network: str) -> None:
    from mindspore.nn.utils import no_init_parameters

    from diffusion.models import build

    config = load_model_config(model)
    with no_init_parameters():
        cell = build(config, network)
    theirs = {parameter.name: tuple(parameter.shape) for parameter in cell.get_parameters()}
    ours = {
        "unet": lambda: structure.unet_shapes(config.unet),
        "vae": lambda: structure.vae_shapes(config.vae),
        "text_encoder": lambda: structure.text_encoder_shapes(config.text_encoder),
    }[network]()
    assert ours == theirs


@pytest.mark.parametrize("model", made.MODELS)
def test_a_structure_is_recognised_from_its_own_shapes(model: str) -> None:
    expected, shapes = made.MODELS[model], made.shapes(model)
    assert structure.unet_of(shapes["unet"]) == expected.unet
    assert structure.vae_of(shapes["vae"]) == expected.vae
    assert structure.text_encoder_of(shapes["text_encoder"]) == expected.text_encoder
    for network, found in shapes.items():
        assert structure.shapes_of(structure.RECOGNISE[network](found)) == found


@pytest.mark.parametrize("network", structure.NETWORKS)
def test_what_is_no_network_is_refused_with_the_name_that_is_missed(network: str) -> None:
    with pytest.raises(WeightsError, match="no tensor is called like") as raised:
        structure.RECOGNISE[network]({"some.thing": (3, 4)})
    assert "\\" not in str(raised.value)
