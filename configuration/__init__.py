"""Typed configurations of the architectures; no torch."""
