"""Both stages in one process: a checkpoint that answers without a server."""
