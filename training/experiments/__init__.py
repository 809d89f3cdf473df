"""What only experiments need: rivals of both samplers, controls of the selector, a grounding loss.

They stand at the joint model's hooks (`training.hooks`). Nothing in services/, and nothing else in training/, imports
this package; the entry points name its task, and a run's configuration chooses.
"""
