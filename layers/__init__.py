"""Building blocks below the networks: relative position bias, the fused cross-entropy,
what suits CPUs.
"""
