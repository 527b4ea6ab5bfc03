"""`qguard-edge convert`: flags to a request, a report to tables."""
