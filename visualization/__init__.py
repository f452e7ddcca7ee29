"""Drawings, HTML pages, files of codes, and the pixel decoder."""
