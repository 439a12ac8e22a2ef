"""Finding, fetching and loading base models: `locate` a name, `load_tokenizer`, `load_model`, `model_digest`."""
