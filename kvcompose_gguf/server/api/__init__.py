"""Requests and answers in llama-server's and OpenAI's form."""
