"""``lora-launch``: from a config to processes that train, watched, and a published LoRA."""
