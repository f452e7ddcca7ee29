"""Where a run computes: processes, devices, seeds, signals, sharded weights, compilation,
meters and loggers.
"""
