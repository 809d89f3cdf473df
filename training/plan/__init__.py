"""What a training run needs before it starts: memory by part, the micro-batch that fits, and hours."""
