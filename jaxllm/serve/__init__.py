"""The HTTP server: `python -m jaxllm.serve [MODEL]`, spoken to with any OpenAI client."""
