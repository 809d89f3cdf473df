"""The paper: the two samplers and their losses, in pure torch."""
