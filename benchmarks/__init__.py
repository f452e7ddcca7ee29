"""What benchmark.py compares with."""
