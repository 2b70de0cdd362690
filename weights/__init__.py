"""Weight files and LoRA arithmetic: arrays in, arrays out, without MindSpore."""
