"""The command lines of the stages: a module of flags for each, which also says which
cannot go together, and the groups that they share.
"""
