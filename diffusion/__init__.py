"""Stable Diffusion in MindSpore: networks, noise schedule, solvers, LoRA layers, pipeline."""

import os

# On CPUs with AVX-512 the oneDNN of MindSpore 2.10 finds no fast kernel for a float32 convolution
# and takes its reference one: 400 ms instead of 4 for 128 channels of 16 × 16, batch 8. It reads
# this once, at its first use. Neither Ascend nor other CPUs look at it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
