"""From queries to evidence: what a method asks for, and how it is collected."""
