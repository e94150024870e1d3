"""What turns features into pictures and numbers."""
