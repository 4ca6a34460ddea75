"""An HTTP server that speaks OpenAI's protocol, with soft tokens."""
