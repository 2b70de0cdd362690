"""The commands that made the assets."""
