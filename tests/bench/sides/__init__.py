"""What runs in a process of its own: a module a side, a function a measurement, JSON in and JSON out.

Every measurement of training returns `seconds` (one for each step after the warm-up), `peak_bytes`, `losses` (the
first is before any update), `trainable_parameters` and `trained_tokens` (of one step).
"""
