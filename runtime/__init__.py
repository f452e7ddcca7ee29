"""Where a run computes: processes, devices, signals, sharded weights, compilation,
meters and loggers.
"""
