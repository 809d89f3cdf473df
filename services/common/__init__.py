"""What every stage shares: types that cross a stage, the wire, media limits, errors, metric names."""
