"""The merged model in the forms that other programs open."""

TARGETS = ("huggingface", "vllm", "vllm-lora", "gguf", "onnx", "torch-export")
"""What `lora-rm export --to` takes; `lora_rm.workflow.EXPORTS` has the function that writes each."""
