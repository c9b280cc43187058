"""Label maps as they are stored and named: their encodings, their tables and their colours."""
