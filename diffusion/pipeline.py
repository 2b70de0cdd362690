"""Text to image: prompts and seeds in, pixels out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from diffusion import models
from diffusion.config import ModelConfig
from diffusion.layers import Network
from diffusion.lora import attach, set_attached
from diffusion.models import evaluating
from diffusion.prompts import chunks, weighted
from diffusion.randomness import generator
from diffusion.schedule import ALPHAS_CUMPROD, TRAIN_TIMESTEPS, sigmas
from diffusion.solvers import noise_levels, rescale_guidance, solve
from diffusion.tokenizer import Tokenizer, clip_vocabulary
from weights.base import Base
from weights.lora import Adapters, combine, merge

Weighted = Sequence[tuple[Adapters, float]]
"""LoRAs, each with its strength."""


class _Both(Network):
    """The UNet without and with the text, in one batched pass."""

    def __init__(self, unet: nn.Cell):
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(
        self, latents: Tensor, timesteps: Tensor, negative: Tensor, positive: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ops.chunk(self.unet(latents, timesteps, ops.concat((negative, positive))), 2)


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn."""

    steps: int = 20
    scale: float = 7.5
    """Classifier-free guidance (Ho & Salimans, 2022); at 1 the pass without text is left out."""
    solver: str = "dpm++2m"
    spacing: str | None = None
    """Of timesteps: leading, trailing or linspace; default: the solver's."""
    eta: float | None = None
    """Noise that ddim and euler-a add again; default: 0 and 1."""
    rescale: float = 0.0
    """How much guided predictions are brought back to the contrast of those with text."""
    size: tuple[int, int] | None = None
    """Pixels, (width, height); default: the model's own."""
    batch: int = 1
    """Pictures in one pass. With 1 a picture is the same to the bit whatever is drawn beside it;
    with more, the last bits of a matrix product depend on the row that it stands in."""


class Pipeline:
    """The networks of one model, compiled once and used for any number of pictures.

    Networks in training can be used too: each picture is drawn with their weights of that moment.
    Without a text encoder there is `latents`, without a VAE no `pixels`. `alphas_cumprod` (1000,)
    is the schedule that the UNet was trained with.
    """

    def __init__(
        self,
        config: ModelConfig,
        unet: nn.Cell,
        text_encoder: nn.Cell | None,
        vae: nn.Cell | None,
        alphas_cumprod: np.ndarray = ALPHAS_CUMPROD,
    ):
        self.config = config
        self.unet = unet
        self.text_encoder = text_encoder
        self.vae = vae
        self.sigmas = sigmas(alphas_cumprod)
        self.tokenizer = Tokenizer(clip_vocabulary(), config.text_encoder.pad_token_id)
        self._both = _Both(unet)
        self._base: dict[str, dict[str, np.ndarray]] = {}
        """Tensors of the base that a LoRA has been merged into, by network."""
        self._attached: list[Adapters] | None = None
        self._states: dict[bytes, np.ndarray] = {}
        """Hidden states of chunks of text that were read with the LoRAs of now."""

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        base: Base,
        alphas_cumprod: np.ndarray = ALPHAS_CUMPROD,
        dtype: Any = ms.float32,
    ) -> Pipeline:
        """With the weights of a base, UNet and text encoder in `dtype`; raises WeightsError as
        `models.load`."""
        unet, text_encoder, vae = (
            models.load(config, base, network, dtype=dtype)
            for network in ("unet", "text_encoder", "vae")
        )
        models.transform_convolutions(unet)
        models.transform_convolutions(vae, "decoder")
        return cls(config, unet, text_encoder, vae, alphas_cumprod)

    def merge_loras(self, loras: Weighted) -> None:
        """Add LoRAs into the weights of the base, in place of those that were added before."""
        self._states.clear()
        wanted = combine(loras)
        for name, network in self._networks().items():
            found = wanted.get(name, {})
            kept = self._base.setdefault(name, {})
            adapted = {f"{module}.weight" for module in found} - kept.keys()
            for parameter in network.get_parameters():
                if parameter.name in adapted:
                    kept[parameter.name] = parameter.asnumpy().copy()
            of_found = {f"{module}.weight": kept[f"{module}.weight"] for module in found}
            merged = {**kept, **(merge(of_found, found) if found else {})}
            models.set_weights(network, merged.items(), "the LoRA")

    def attach_loras(self, loras: Sequence[Adapters]) -> None:
        """Put LoRAs beside the weights of the base, once; `weigh_loras` says how they count."""
        self._attached = list(loras)
        wanted = combine([(adapters, 1.0) for adapters in loras])
        for name, network in self._networks().items():
            attach(network, wanted.get(name, {}))

    def weigh_loras(self, weights: Sequence[float]) -> None:
        """Let each of the attached LoRAs count so much; compiles nothing anew."""
        assert self._attached is not None
        self._states.clear()
        wanted = combine(list(zip(self._attached, weights)))
        for name, network in self._networks().items():
            set_attached(network, wanted.get(name, {}))

    def _networks(self) -> Mapping[str, nn.Cell]:
        assert self.text_encoder is not None
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def encode(self, prompt: str) -> np.ndarray:
        """Hidden states (77 · chunks, width) of a prompt of any length, with its emphasis.

        Each chunk is read alone, so that its states do not depend on others, and once.
        """
        assert self.text_encoder is not None
        states = []
        with evaluating(self.text_encoder):
            for chunk in chunks(self.tokenizer, prompt):
                key = chunk.ids.tobytes()
                if key not in self._states:
                    self._states[key] = self.text_encoder(Tensor(chunk.ids[None])).asnumpy()[0]
                states.append(weighted(self._states[key], chunk))
        return np.concatenate(states).astype(np.float32)

    def encode_pair(self, prompt: str, negative: str) -> tuple[np.ndarray, np.ndarray]:
        """Those of a prompt and its negative one, the shorter filled up with chunks of no text."""
        pair = [self.encode(prompt), self.encode(negative)]
        length = max(map(len, pair))
        for number, states in enumerate(pair):
            empty = [self.encode("")] * ((length - len(states)) // self.tokenizer.context_length)
            pair[number] = np.concatenate([states, *empty])
        return pair[0], pair[1]

    def pixels(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (n, c, h, w) → float32 (n, height, width, 3) in [-1, 1] or about, one
        picture at a time."""
        assert self.vae is not None
        unscaled = (latents / self.config.vae.scaling_factor).astype(np.float32)
        with evaluating(self.vae):
            decoded = [self.vae(Tensor(one[None])).asnumpy() for one in unscaled]
        return np.concatenate(decoded).transpose(0, 2, 3, 1)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The same as levels: uint8 (n, height, width, 3)."""
        return levels(self.pixels(latents))

    def text_to_image(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = Settings(),
        negative: str = "",
    ) -> np.ndarray:
        """One picture for each prompt and its seed: uint8 (n, height, width, 3)."""
        drawn = []
        for prompt, seed in zip(prompts, seeds):
            positive, without = self.encode_pair(prompt, negative)
            drawn.append(self.latents(positive[None], without[None], [seed], settings))
        return self.decode(np.concatenate(drawn))

    def latent_shape(self, settings: Settings = Settings()) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one picture."""
        width, height = settings.size or (self.config.resolution,) * 2
        factor = self.config.vae.factor
        return self.config.vae.latent_channels, height // factor, width // factor

    def latents(
        self,
        positive: np.ndarray,
        negative: np.ndarray,
        seeds: Sequence[int],
        settings: Settings = Settings(),
        progress: Callable[[int], None] = lambda images: None,
    ) -> np.ndarray:
        """Scaled latents (n, c, h, w), float64, one for each of n seeds.

        `positive` and `negative` (n, tokens, width) have the hidden states of prompts and negative
        ones. `progress` is called with the number of pictures that are denoised.
        """
        count, shape, batch = len(seeds), self.latent_shape(settings), settings.batch
        steps = noise_levels(settings.solver, settings.steps, self.sigmas, settings.spacing)
        drawn = []
        with evaluating(self.unet):
            for start in range(0, count, batch):
                rows = [min(start + i, count - 1) for i in range(batch)]

                def normal(purpose: str, number: int = 0, rows: Sequence[int] = rows) -> np.ndarray:
                    draws = [generator(seeds[row], purpose, number) for row in rows]
                    return np.stack([draw.standard_normal(shape) for draw in draws])

                denoise = self._denoiser(positive[rows], negative[rows], settings)
                # A network in the variance-preserving form starts from N(0, 1) at its noisiest.
                x = normal("latents") * np.sqrt(steps[0] ** 2 + 1)
                x = solve(
                    settings.solver,
                    denoise,
                    x,
                    steps,
                    lambda number, normal=normal: normal("noise of a step", number),
                    settings.eta,
                )
                drawn.append((x / np.sqrt(steps[-1] ** 2 + 1))[: count - start])
                progress(min(start + batch, count))
        return np.concatenate(drawn)

    def _denoiser(
        self, positive: np.ndarray, negative: np.ndarray, settings: Settings
    ) -> Callable[[np.ndarray, float], np.ndarray]:
        """(x, σ) → x₀ for one batch of texts, by the model's parametrisation."""
        texts = (Tensor(negative), Tensor(positive))
        scale = settings.scale

        def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
            root = np.sqrt(sigma**2 + 1)
            timestep = np.interp(np.log(sigma), np.log(self.sigmas), np.arange(TRAIN_TIMESTEPS))
            latents = Tensor((x / root).astype(np.float32))
            timesteps = Tensor(np.full(len(x), timestep, np.float32))
            if scale == 1:
                output = self.unet(latents, timesteps, texts[1])
                prediction = output.asnumpy().astype(np.float64)
            else:
                outputs = self._both(latents, timesteps, *texts)
                without, with_text = (part.asnumpy().astype(np.float64) for part in outputs)
                prediction = without + scale * (with_text - without)
                if settings.rescale:
                    prediction = rescale_guidance(prediction, with_text, settings.rescale)
            if self.config.prediction_type == "epsilon":
                return x - sigma * prediction
            return x / root**2 - sigma / root * prediction

        return denoise


def levels(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] as uint8."""
    return ((np.clip(pixels, -1, 1) + 1) * 127.5).round().astype(np.uint8)
