"""KV history of decoding."""
