"""Versions of LoRAs with their scores and lineage: ``name@version``, immutable and verified.

The Python interface is ``registry.api``, the command line ``registry.cli``.
"""
