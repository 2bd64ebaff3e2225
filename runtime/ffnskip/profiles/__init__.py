"""The profile as a file: schema, strict loader, identity of the model, weights."""
