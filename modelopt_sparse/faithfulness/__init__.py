"""What skipping costs: a model's dense outputs against its sparse ones."""
