"""What is the method? Quantizers, observers, the recursion, rotations and costs; torch only."""
