"""Text: where it comes from, how it becomes windows of tokens, and the guard that keeps evaluation text unseen."""
