"""A server of tuned models: what is asked in OpenAI's forms, written together, streamed back."""
