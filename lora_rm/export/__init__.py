"""The merged model in the forms that other programs open."""

TARGETS = ("huggingface", "vllm", "vllm-lora", "gguf", "onnx", "torch-export")
"""What `lora-rm export --to` takes. `export_X` in X.py writes one; X is imported when it is asked for."""
