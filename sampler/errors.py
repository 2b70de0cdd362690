"""What the sampler raises."""


class SampleError(ValueError):
    """Pictures or scores that cannot be had as asked; the message is one sentence."""
