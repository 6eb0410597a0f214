"""The parts of denoising_loop.py: models, variants, processes that take turns, and what they report."""
