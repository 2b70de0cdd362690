"""The one exception of the cluster room."""


class ClusterError(ValueError):
    """The machine is not what was asked for; the message is one sentence with the remedy."""
