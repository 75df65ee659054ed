"""Speculative decoding: a draft model proposes tokens, the target model verifies them."""
