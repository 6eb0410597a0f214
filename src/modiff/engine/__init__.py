"""How is a job run? Generation in batches that can be stopped and taken up again."""
