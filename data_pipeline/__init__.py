"""How images are found and read: folders, shards, formats, samplers, augmentation,
ImageNet's classes.
"""
