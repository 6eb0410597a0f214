"""How is a job run? Generation that can be stopped at any moment and taken up again, here or on a Ray cluster."""
