"""The demo model: data generators, training model and evaluation (development only; needs torch and tokenizers)."""
