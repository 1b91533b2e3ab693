"""An HTTP server with OpenAI's completions and chat API, for trying models and for evaluation."""
