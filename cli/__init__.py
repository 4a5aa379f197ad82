"""The varidepth command."""
