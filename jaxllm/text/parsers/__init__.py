"""What a model wrote, told apart while it is being written: reasoning, answer, tool calls."""
