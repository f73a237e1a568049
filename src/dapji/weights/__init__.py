"""Models on disk: GGUF and safetensors read and written, quantising and converting, and the store that fetches them.

Gives weights and metadata under foreign names; dapji.models translates them. Runs no model. Sits beside chat.
"""
