"""Segmentation's data and evaluation: pairs of image and mask, joint views, sliding
window.
"""
