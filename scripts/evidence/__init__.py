"""The evidence: questions, their grid of small runs, and the tables made from it."""
