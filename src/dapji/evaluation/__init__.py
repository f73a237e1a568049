"""What a model is worth and how fast it is: perplexity, speed. Drives executors and engines; prints nothing."""
