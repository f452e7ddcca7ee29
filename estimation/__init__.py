"""What a run will need, from the entry's own step on tensors that hold no data."""
