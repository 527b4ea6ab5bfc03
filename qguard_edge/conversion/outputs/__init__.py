"""One file per kind of output: what it adds to the run."""
