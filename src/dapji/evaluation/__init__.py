"""What a model is worth (exams, tasks, perplexity) and how fast it is. Drives executors and engines; prints nothing."""
