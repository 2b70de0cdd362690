"""Pictures and scores from a base model and its LoRAs."""
