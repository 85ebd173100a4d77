"""The statements of the papers that can be checked exactly: one file per paper, one function per claim."""
