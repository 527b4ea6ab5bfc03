"""Reports: pure functions from a `Verification` to text, one module per format.

junit     one test case per check, for CI systems
sarif     one result per failed or undecided check, for code scanning
markdown  for pull requests and job summaries
html      one file that needs nothing else, for people
"""
