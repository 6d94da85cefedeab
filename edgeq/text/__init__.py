"""Text in and out: tokenizer, chat template, append-only conversations, streaming text, thinking and answer."""
