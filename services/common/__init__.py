"""What every stage shares: types that cross a stage, their ranges, the wire, media limits, errors, metric names."""
