"""Answers chats: checks messages and tools, and makes messages from the model's text."""
