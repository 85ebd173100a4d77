"""What several commands share. It uses `algos` and `shared`; no module here is a command."""
