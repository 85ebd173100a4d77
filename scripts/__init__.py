"""Commands that surround the algorithms: data, sampling, scoring, evaluation and experiments."""
