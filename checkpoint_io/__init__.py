"""Files of weights: checkpoints, what is in a weight file, other libraries' formats,
remapping into our models.
"""
