"""What is asked and how answers are judged: built-in suites, users' own, and the matchers of both."""
