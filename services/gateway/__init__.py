"""The public door: checks requests, keeps encoded images, calls the two stages."""
