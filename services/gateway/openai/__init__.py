"""OpenAI's API over HTTP: requests read, answers written, errors as its clients know them."""
