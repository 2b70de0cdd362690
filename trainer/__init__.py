"""One rank's work: config schema, data, step, gradient sync, checkpoints, training loop."""
