"""Text to image: prompts and seeds in, pixels out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops

from diffusion import models
from diffusion.config import ModelConfig
from diffusion.models import evaluating, in_batches
from diffusion.randomness import generator
from diffusion.schedule import ALPHAS_CUMPROD, TRAIN_TIMESTEPS, sigmas
from diffusion.solvers import SOLVERS, linspace_sigmas
from diffusion.tokenizer import Tokenizer, clip_vocabulary
from weights.base import Base
from weights.lora import Adapters, merge

BATCH = 4
"""Images drawn at once. Every batch has this size, so nothing compiles twice and a picture does
not depend on its neighbours."""


class _Guided(nn.Cell):
    """Classifier-free guidance (Ho & Salimans, 2022) in one batched pass."""

    def __init__(self, unet: nn.Cell):
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(
        self, latents: Tensor, timesteps: Tensor, negative: Tensor, positive: Tensor, scale: Tensor
    ) -> Tensor:
        both = self.unet(
            ops.concat((latents, latents)),
            ops.concat((timesteps, timesteps)),
            ops.concat((negative, positive)),
        )
        without, with_text = ops.chunk(both, 2)
        return without + scale * (with_text - without)


@dataclass(frozen=True)
class Settings:
    """How a picture is drawn."""

    steps: int = 20
    scale: float = 7.5
    solver: str = "dpm++2m"
    negative: str = ""
    resolution: int | None = None
    """Pixels along each side; default: the model's own."""


class Pipeline:
    """The networks of one model, compiled once and used for any number of pictures.

    Networks in training can be used too: each picture is drawn with their weights of that moment.
    Without a text encoder there is `latents`, without a VAE no `decode`. `alphas_cumprod` (1000,)
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
        self.guided = _Guided(unet)

    @classmethod
    def load(
        cls, config: ModelConfig, base: Base, alphas_cumprod: np.ndarray = ALPHAS_CUMPROD
    ) -> Pipeline:
        """With the weights of a base, in float32; raises WeightsError as `models.load`."""
        unet, text_encoder, vae = (
            models.load(config, base, network) for network in ("unet", "text_encoder", "vae")
        )
        return cls(config, unet, text_encoder, vae, alphas_cumprod)

    def merge_lora(self, adapters: Adapters, weight: float = 1.0) -> None:
        """Add a LoRA, by network and module, into the weights."""
        networks = {"unet": self.unet, "text_encoder": self.text_encoder}
        for name, found in adapters.items():
            network = networks[name]
            adapted = {f"{module}.weight" for module in found}
            tensors = {p.name: p.asnumpy() for p in network.get_parameters() if p.name in adapted}
            models.set_weights(network, merge(tensors, found, weight).items(), "the LoRA")

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Hidden states (len(texts), 77, width)."""
        ids = self.tokenizer(texts)
        return in_batches(self.text_encoder, ids, BATCH)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (n, c, h, w) → uint8 (n, height, width, 3)."""
        unscaled = (latents / self.config.vae.scaling_factor).astype(np.float32)
        pixels = in_batches(self.vae, unscaled, BATCH)
        levels = (np.clip(pixels, -1, 1) + 1) * 127.5
        return levels.round().astype(np.uint8).transpose(0, 2, 3, 1)

    def text_to_image(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = Settings(),
        progress: Callable[[int], None] = lambda images: None,
    ) -> np.ndarray:
        """One picture for each prompt and its seed: uint8 (n, height, width, 3).

        `progress` is called with the number of pictures that are denoised.
        """
        text = self.encode_text([*prompts, settings.negative])
        return self.decode(self.latents(text, seeds, settings, progress))

    def latent_shape(self, settings: Settings = Settings()) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one picture."""
        size = (settings.resolution or self.config.resolution) // self.config.vae.factor
        return self.config.vae.latent_channels, size, size

    def latents(
        self,
        text: np.ndarray,
        seeds: Sequence[int],
        settings: Settings = Settings(),
        progress: Callable[[int], None] = lambda images: None,
    ) -> np.ndarray:
        """Scaled latents (n, c, h, w), float64, one for each of n seeds.

        `text` (n + 1, 77, width) has the hidden states of n prompts and, last, of the negative
        one. `progress` is called with the number of pictures that are denoised.
        """
        count, shape = len(seeds), self.latent_shape(settings)
        levels = linspace_sigmas(settings.steps, self.sigmas)
        drawn = []
        with evaluating(self.unet):
            for start in range(0, count, BATCH):
                rows = [min(start + i, count - 1) for i in range(BATCH)]
                noise = np.stack(
                    [generator(seeds[row], "latents").standard_normal(shape) for row in rows]
                )
                denoise = self._denoiser(text[rows], text[[-1] * BATCH], settings.scale)
                # A network in the variance-preserving form starts from N(0, 1) at its noisiest.
                x = noise * np.sqrt(levels[0] ** 2 + 1)
                latents = SOLVERS[settings.solver](denoise, x, levels)
                drawn.append(latents[: count - start])
                progress(min(start + BATCH, count))
        return np.concatenate(drawn)

    def _denoiser(
        self, positive: np.ndarray, negative: np.ndarray, scale: float
    ) -> Callable[[np.ndarray, float], np.ndarray]:
        """(x, σ) → x₀ for one batch of texts, by the model's parametrisation."""
        texts = (Tensor(negative), Tensor(positive))
        guided = scale != 1

        def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
            root = np.sqrt(sigma**2 + 1)
            timestep = np.interp(np.log(sigma), np.log(self.sigmas), np.arange(TRAIN_TIMESTEPS))
            latents = Tensor((x / root).astype(np.float32))
            timesteps = Tensor(np.full(len(x), timestep, np.float32))
            if guided:
                output = self.guided(latents, timesteps, *texts, Tensor(np.float32(scale)))
            else:
                output = self.unet(latents, timesteps, texts[1])
            prediction = output.asnumpy().astype(np.float64)
            if self.config.prediction_type == "epsilon":
                return x - sigma * prediction
            return x / root**2 - sigma / root * prediction

        return denoise
