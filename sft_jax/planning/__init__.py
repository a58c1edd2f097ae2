"""What a step would need on hardware that need not be there."""
