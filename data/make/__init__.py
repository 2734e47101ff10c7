"""Makes everything in `data/` from a seed: task sets, tokenizer, tiny base model. `python -m data.make` runs it all."""
