"""Chat templates, tools, grammars and the bodies of chat answers."""
