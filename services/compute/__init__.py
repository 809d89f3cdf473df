"""What computes: compiled CPU operators, linear layers, dtypes, and what this processor and memory can do."""
