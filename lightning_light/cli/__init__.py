"""The command `lightning-light`, the same as `python -m lightning_light`."""
