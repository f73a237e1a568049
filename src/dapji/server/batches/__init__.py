"""Batches: requests in a file, answered when nobody else asks. Knows no protocol but the form of that file."""
