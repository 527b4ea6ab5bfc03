"""One run for every conversion: requests, reports, the run itself, and what each output adds."""
