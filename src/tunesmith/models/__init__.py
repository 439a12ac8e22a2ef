"""Finds, fetches and loads base models: `locate` a name, `load_tokenizer`, `load_model`, `model_digest`."""
