"""One command a file. Heavy imports stay inside the functions: 'collegium --help' reads every file here."""
