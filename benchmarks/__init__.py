"""What the figures in the documentation are made with: `python -m benchmarks.NAME`."""
