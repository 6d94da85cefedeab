"""One conversation or text with a model: the context that grows, replies, and the chat that keeps both together."""
