"""What only experiments need: rivals of both samplers, controls of the selector, a grounding loss.

They stand in a subclass of the stage's module (`task.ExperimentModule`). Nothing in services/, and nothing else in
training/, imports this package; the entry points name its task, and a run's configuration chooses.
"""
