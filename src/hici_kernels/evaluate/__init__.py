"""Evaluation of long-context models: perplexity, passkey and topic retrieval, the standard harness, leak tests."""
