"""How the three Serve applications are wired, deployed, scaled and watched."""
