"""Where the parts of a Hugging Face model are, and its matrices."""
