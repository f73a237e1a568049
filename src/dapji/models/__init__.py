"""What a model is and what runs it: `ModelConfig`, THE decoder, families of foreign descriptions, executors.

Token ids and weights in, logits out. Knows neither files nor text nor requests. Sits on ops; beside tokenizer.
"""
