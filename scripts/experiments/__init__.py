"""The papers' experiments in a small world whose true reward is known: a file per paper, a function per statement."""
