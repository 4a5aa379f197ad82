"""Checkpoints to checkpoints: layer maps, initialisation, streaming writer."""
