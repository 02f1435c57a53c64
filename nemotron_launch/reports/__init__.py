"""What makes a run readable: its numbers read as they grow, plots, warnings in plain words, a page of its own."""
