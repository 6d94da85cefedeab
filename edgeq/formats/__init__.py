"""The ground floor: number formats and file structures, which know nothing of models.

bf16, affine and ggml codes; safetensors and GGUF files; how tensors are called in them. Whatever reads or writes
weights stands on it, and it imports nothing of edgeq but the errors.
"""
