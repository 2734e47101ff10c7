"""Adapters of PEFT, both ways: settings (`config.py`), names (`names.py`), experts, reading and writing."""
