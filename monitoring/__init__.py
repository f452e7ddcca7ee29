"""What a run tells: on the terminal, in its files, to TensorBoard."""
