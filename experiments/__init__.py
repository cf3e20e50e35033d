"""Experiments to run from a shell: `python -m experiments.NAME [preset] [--field value ...]`."""
