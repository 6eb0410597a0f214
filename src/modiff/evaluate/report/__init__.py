"""What a reader gets to see: one HTML file that needs nothing else, and the same as Markdown."""
