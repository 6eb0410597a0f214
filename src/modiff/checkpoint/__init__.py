"""What goes to disk and comes back: whole files or none."""
