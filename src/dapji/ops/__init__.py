"""The ops that every model is made of, three times: numpy reference, torch, native (recorded, replayed in C++).

Knows tensors, formats and batches; knows neither models nor files nor text. Bottom layer above `errors`.
"""
