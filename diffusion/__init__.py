"""Stable Diffusion in MindSpore: networks, noise schedule, solvers, LoRA layers, pipeline."""
