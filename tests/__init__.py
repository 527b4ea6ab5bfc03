"""The tests, one folder per package; what several of them use lies in `tests.helpers`."""
