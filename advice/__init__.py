"""What to train, and how, on a folder of images: what is in it (inspection), and the
command lines that suit it (plan). advise.py prints them, scripts/demo.py runs them.
"""
