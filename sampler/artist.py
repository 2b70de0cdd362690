"""Draws pictures with one base and several LoRAs; the only part of drawing that needs MindSpore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np

from diffusion.config import ModelConfig
from diffusion.pipeline import Pipeline, Settings, levels
from diffusion.schedule import ALPHAS_CUMPROD, SIGMAS, sigmas, zero_terminal
from sampler.picture import Picture, Used
from weights.base import Base
from weights.lora import Adapters

_DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}
_SIGMAS = {False: SIGMAS, True: sigmas(zero_terminal(ALPHAS_CUMPROD))}
"""Noise levels, of the ordinary schedule and the one with zero-terminal SNR."""


class Artist:
    """A base in memory, with whatever LoRAs the next picture wants.

    `adapters` has the matrices of every LoRA that may be wanted, by the digest of its file.
    """

    def __init__(
        self,
        config: ModelConfig,
        base: Base,
        adapters: Mapping[str, Adapters],
        *,
        apart: bool,
        precision: str,
    ):
        self.pipeline = Pipeline.load(config, base, dtype=_DTYPES[precision])
        self.adapters = adapters
        self.apart = apart
        self._loras: tuple[Used, ...] = ()
        if apart:
            self.pipeline.attach_loras(list(adapters.values()))
            self._weigh(())

    def draw(self, batch: Sequence[Picture]) -> list[np.ndarray | None]:
        """Pictures of one pass, whose `row` says where: each as uint8 (height, width, 3), or None
        if it came out as NaN."""
        first = batch[0]
        if first.loras != self._loras:
            self._weigh(first.loras)
        self.pipeline.sigmas = _SIGMAS[first.zero_terminal_snr]
        rows = [first] * first.batch
        for picture in batch:
            rows[picture.row] = picture
        pairs = [self.pipeline.encode_pair(one.prompt, one.negative) for one in rows]
        latents = self.pipeline.latents(
            np.stack([positive for positive, _ in pairs]),
            np.stack([negative for _, negative in pairs]),
            [one.seed for one in rows],
            Settings(
                steps=first.steps,
                scale=first.scale,
                solver=first.solver,
                spacing=first.spacing,
                eta=first.eta,
                rescale=first.rescale,
                size=(first.width, first.height),
                batch=first.batch,
            ),
        )
        return [self._developed(latents[picture.row][None]) for picture in batch]

    def _developed(self, latents: np.ndarray) -> np.ndarray | None:
        if not np.isfinite(latents).all():
            return None
        pixels = self.pipeline.pixels(latents)[0]
        return levels(pixels) if np.isfinite(pixels).all() else None

    def _weigh(self, loras: tuple[Used, ...]) -> None:
        if self.apart:
            weights = dict.fromkeys(self.adapters, 0.0)
            for used in loras:
                weights[used.sha256] += used.weight
            self.pipeline.weigh_loras(list(weights.values()))
        else:
            self.pipeline.merge_loras([(self.adapters[used.sha256], used.weight) for used in loras])
        self._loras = loras
