"""The run config: a strict schema; needs no MindSpore."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigError(ValueError):
    """A config that cannot be used; the message is one sentence with the remedy."""


Decay = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class BaseModelConfig(_Strict):
    """The model that is fine-tuned."""

    model: str | None = None
    """A name in configs/models (sd15, sd15-v, sd20, sd21, sd21-v, emoji) or the path of a YAML
    file; default: recognised from the weights."""

    weights: str
    """A diffusers folder, an original Stable Diffusion .safetensors file, or a MindSpore .ckpt with
    MindONE's names."""

    allow_nan: bool = False
    """Take weights that hold NaN or infinity."""

    initialise: tuple[Literal["unet", "text_encoder"], ...] = ()
    """Networks that begin with random weights instead; only with `train: all`."""


class SetConfig(_Strict):
    """One folder of images among several, where it differs from the others."""

    folder: str
    """Images, with .txt captions beside them or a table: metadata.jsonl or metadata.csv with
    file_name and text, or a .csv of MindONE's with dir and text."""

    repeats: int = Field(1, ge=1)
    """How often each of its images is shown in one epoch."""

    prefix: str | None = None
    """In place of `data.prefix`."""

    loss_weight: float = Field(1.0, ge=0)
    """What its images count in the loss."""

    regularisation: bool = False
    """Images of the wider class, which the LoRA should leave as they are: in an epoch as many are
    shown as of all other sets together, and without the prefix."""


class DataConfig(_Strict):
    """Images and captions."""

    train: tuple[SetConfig, ...] = Field(min_length=1)
    """A folder of images, or a list of folders; where they differ, of the keys under `data.train`
    below."""

    prefix: str = ""
    """Put before every caption, such as a trigger word: "in sks style, "."""

    validation: str | None = None
    """A folder of held-out images; without it no validation loss is measured."""

    resolution: int | None = Field(None, gt=0)
    """Pixels along each side of a square, the area of any other shape; default: the model's own."""

    shapes: int = Field(1, ge=1, le=7)
    """Most shapes of picture that images are sorted into, from upright to wide, instead of being
    cropped to a square. Each costs a compilation, and a global batch is of one shape."""

    crop: Literal["center", "random"] = "center"
    """Which part of an image that does not fit its shape is seen. random is another part each time,
    so latents are computed at every step instead of once."""

    flip: bool = False
    """Show half of the samples mirrored; not for text or faces."""

    masks: Literal["alpha", "file"] | None = None
    """What the loss looks at: alpha, where the image is opaque; file, where `NAME.mask.png` beside
    `NAME.png` is white. Images without either count everywhere."""

    shuffle_captions: bool = False
    """Put the comma-separated parts of a caption in another order each time."""

    keep_tokens: int = Field(0, ge=0)
    """How many parts stay in front of a shuffled caption; the prefix does in any case."""

    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Share of samples that see an empty caption, so that guidance works; 0.05 to 0.1 is usual."""

    @model_validator(mode="before")
    @classmethod
    def _folders(cls, values: Any) -> Any:
        """A folder, or a list of folders, in the long form."""
        if isinstance(values, dict) and "train" in values:
            train = values["train"]
            sets = [train] if isinstance(train, (str, dict, SetConfig)) else train
            if isinstance(sets, (list, tuple)):
                sets = tuple({"folder": one} if isinstance(one, str) else one for one in sets)
                values = {**values, "train": sets}
        return values

    @model_validator(mode="after")
    def _something_to_learn(self) -> DataConfig:
        if all(one.regularisation for one in self.train):
            raise ValueError("every set of `data.train` is regularisation; add one to learn from")
        return self


class LoRAConfig(_Strict):
    """What the adapter is. The update is (alpha / rank) · up · down."""

    rank: int = Field(4, ge=1)
    """Width of the two thin matrices; 4 to 32 is usual. Size and traffic grow with it."""

    alpha: float | None = Field(None, gt=0)
    """Strength; default: the rank, so that the update is not scaled."""

    rank_stabilised: bool = False
    """Scale by alpha / √rank instead of alpha / rank (rsLoRA), for ranks above 32 or so."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the rank's components left out of each sample, against over-fitting."""

    targets: Literal["attention", "transformer", "convolution"] = "attention"
    """attention: q, k, v and out of the UNet's attention. transformer: kohya's default set, every
    linear and 1×1 convolution of the UNet's transformers (twice the size). convolution: the 3×3
    convolutions of the residual blocks too, which texture and line follow from."""

    text_encoder: bool = False
    """Adapt the text encoder's attention and MLP as well; its embeddings are then not cached."""

    start: str | None = None
    """A LoRA to go on from, in place of a fresh one: a file of any dialect, or NAME@VERSION in
    `registry`. Its rank and modules must be those asked for here."""

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / √rank."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class OptimizerConfig(_Strict):
    """How weights follow gradients."""

    name: Literal["adamw", "prodigy"] = "adamw"
    """adamw, with decoupled weight decay; or prodigy, which finds the learning rate by itself and
    needs half as much memory again for the LoRA."""

    learning_rate: float | None = Field(None, gt=0)
    """Peak rate, for the global batch as it is: it is not scaled with the number of devices.
    Default: 1e-4; with prodigy 1, a factor of what it finds."""

    text_encoder_learning_rate: float | None = Field(None, gt=0)
    """Peak rate of the text encoder's LoRA; default: the same. Only with adamw."""

    lora_plus_ratio: float = Field(1.0, gt=0)
    """How much faster the up matrices learn than the down matrices (LoRA+); 4 to 16 is usual. Only
    with adamw."""

    schedule: Literal["constant", "linear", "cosine", "polynomial"] = "cosine"
    """constant, or from the peak to zero at the end: a line, half a cosine, or a parabola."""

    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise to the peak."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments."""

    eps: float = Field(1e-8, gt=0)
    """Smallest divisor."""

    weight_decay: float = Field(1e-2, ge=0)
    """Share of each weight taken off per step, times the learning rate; of all trained weights,
    biases and normalisations too where those are trained."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients longer than this, over all weights together, are shortened to it."""

    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Average of the weights over steps, saved and judged in their place; 0 is none."""

    @property
    def peak(self) -> float:
        """The learning rate that is meant."""
        return self.learning_rate or (1.0 if self.name == "prodigy" else 1e-4)

    @model_validator(mode="after")
    def _one_rate(self) -> OptimizerConfig:
        if self.name == "prodigy" and (
            self.text_encoder_learning_rate or self.lora_plus_ratio != 1
        ):
            raise ValueError(
                "prodigy finds one rate for everything; take `text_encoder_learning_rate` and "
                "`lora_plus_ratio` away, or use adamw"
            )
        return self


class SamplesConfig(_Strict):
    """Pictures that are drawn during training, into the run's folder."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """What to draw; the pictures of one time are one file."""

    every: int = Field(gt=0)
    """Images seen between two times."""

    seed: int = Field(0, ge=0)
    """Of the first picture; each further one takes the next, the same every time."""

    steps: int = Field(20, ge=1)
    """Of the solver."""

    scale: float = 4.0
    """Classifier-free guidance."""


class EvaluationConfig(_Strict):
    """How the LoRA is scored when training is done: pictures of held-out prompts, drawn with it and
    with the base from the same seeds, are compared with real ones. Needs `data.validation`, or
    `prompts` and `real`."""

    prompts: str | None = None
    """A file with a prompt on each line; default: the captions of `data.validation`."""

    most_prompts: int = Field(64, ge=2)
    """Of the captions, the first so many; a file of prompts is used whole."""

    real: str | None = None
    """A folder of real pictures; default: `data.validation`."""

    images_per_prompt: int = Field(1, ge=1)
    """More pictures make intervals narrower, and take longer."""

    seed: int = Field(0, ge=0)
    """Of the first picture; each further one takes the next."""

    steps: int = Field(20, ge=1)
    """Of the solver, DPM-Solver++(2M)."""

    scale: float = Field(4.0, ge=0)
    """Classifier-free guidance; 1 takes half the time."""

    batch: int = Field(4, ge=1)
    """Pictures in one pass."""

    inception: str | None = None
    """Weights of the Inception of FID, pt_inception-2015-12-05-6726825d.pth, for FID and KID as
    they are published."""

    clip: str | None = None
    """Weights of a CLIP, model.safetensors, for CMMD and the CLIP score."""


class ClusterConfig(_Strict):
    """How the processes of a run are watched and bound; it changes nothing of the result."""

    grace_seconds: float = Field(30.0, ge=0)
    """Time to save a checkpoint and end after Ctrl-C or SIGTERM; a second signal cuts it short."""

    start_seconds: float = Field(1800.0, gt=0)
    """A rank that shows no sign of life for so long while it starts, caches, compiles or validates
    is taken to hang; the other nodes of a run must have come by then."""

    step_seconds: float = Field(300.0, gt=0)
    """The same for a training step."""

    checkpoint_seconds: float = Field(600.0, gt=0)
    """The same for saving."""

    straggler_factor: float = Field(1.5, gt=1)
    """A rank is reported as slow when its own work for a step takes so many times what the others'
    does."""

    bind_cores: bool = False
    """Let msrun bind each worker to cores of its own (`--bind_core`)."""

    bind_numa: bool = False
    """Let msrun bind each worker to a NUMA node (`--bind_numa`); needs numactl."""

    tls: bool = False
    """Encrypt the channel on which workers find each other, and let nobody else in: certificates
    are made for each run."""


class RunConfig(_Strict):
    """One training run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Name of the run and of the LoRA in the registry: lower-case letters, digits, . _ and -."""

    train: Literal["lora", "all"] = "lora"
    """lora: the adapter alone, the base frozen. all: every weight of UNet and text encoder."""

    base: BaseModelConfig
    """What is fine-tuned."""

    data: DataConfig
    """What it learns from."""

    lora: LoRAConfig = LoRAConfig()
    """What the adapter is."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """How it learns."""

    epochs: float | None = Field(None, gt=0)
    """Length: how often each image is seen. Give this or `images`."""

    images: int | None = Field(None, gt=0)
    """Length: how many samples are seen in all."""

    global_batch: int = Field(gt=0)
    """Images in one optimizer step, over all devices. More devices mean less time, not another
    result."""

    micro_batch: int = Field(8, gt=0)
    """Most images on one device at once; memory grows with it. Accumulation follows."""

    min_snr_gamma: float | None = Field(5.0, gt=0)
    """Weight of the loss by signal-to-noise ratio (min-SNR); null weighs all timesteps alike."""

    noise_offset: float = Field(0.0, ge=0, le=1)
    """Noise of this strength that is the same over a whole channel, so that very dark and very
    bright pictures can be learned; 0.05 to 0.1 is usual, 0 is none."""

    zero_terminal_snr: bool = False
    """Noise that leaves nothing of the image at the last timestep, so that very dark and very
    bright pictures can be drawn; only for models that predict v. Weighs little with min-SNR."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """What the frozen networks compute in; the LoRA and all sums over devices are fp32 in any
    case. auto: fp16 on Ascend, fp32 on CPU."""

    gradient_checkpointing: bool = False
    """Compute the transformers' activations again in the backward pass instead of keeping them: a
    quarter less memory at 512 pixels and a third more time per step; compiling takes twice as
    long."""

    flash_attention: bool = False
    """Attention by the fused operator of Atlas A2 devices (910B and newer), in fp16 or bf16: by
    estimate less time and memory at 512 pixels. It was compiled, but nobody has run it yet."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random follows from it."""

    output: str = "runs"
    """Folder in which the run's own folder is made."""

    cache: str | None = "runs/cache"
    """Folder of latents and text embeddings, kept between runs; null computes them at every
    step."""

    validate_every: int | None = Field(None, gt=0)
    """Images seen between two measurements of the validation loss; default: only before and after.
    The best is what gets published."""

    patience: int | None = Field(None, ge=1)
    """Stop when so many validations in a row were no better than the best."""

    samples: SamplesConfig | None = None
    """Pictures to draw during training."""

    evaluation: EvaluationConfig | None = EvaluationConfig()
    """How the LoRA is scored when training is done; null does not."""

    registry: str | None = None
    """Where the LoRA is published when training is done: a folder, or s3://BUCKET/PREFIX; null does
    not publish."""

    trigger_words: tuple[str, ...] = ()
    """What has to be in a prompt for the LoRA to be seen; kept with it for who uses it."""

    licence: str | None = None
    """Under which the LoRA may be used, such as apache-2.0; kept with it."""

    save_every: int = Field(500, gt=0)
    """Steps between checkpoints, from which `lora-launch --resume` goes on."""

    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints stay; the best by validation loss does in any case."""

    cluster: ClusterConfig = ClusterConfig()
    """How the processes are watched."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if (self.epochs is None) == (self.images is None):
            raise ValueError(
                "give either `epochs` or `images`, and not both; --set epochs=null takes one away"
            )
        if self.base.initialise and (self.train != "all" or self.base.model is None):
            raise ValueError("`base.initialise` needs `train: all` and `base.model`")
        if self.patience and not (self.validate_every and self.data.validation):
            raise ValueError("`patience` needs `validate_every` and `data.validation`")
        if self.validate_every and not self.data.validation:
            raise ValueError("`validate_every` needs `data.validation`, a folder of images")
        if self.train == "all" and self.precision in ("fp16", "bf16"):
            raise ValueError("`train: all` is done in fp32; take `precision` away")
        return self
