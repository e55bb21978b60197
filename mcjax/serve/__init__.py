"""The HTTP server: OpenAI-compatible answers, histories, a page."""
