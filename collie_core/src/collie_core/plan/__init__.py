"""How much memory a run will hold, from its own steps on tensors without values."""
