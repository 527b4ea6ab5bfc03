"""Prompts and how their answers are judged: built-in suites, users' own, and the matchers of both."""
